"""`quickchange eval`: adapters side by side on a task file, through the engine that serves them."""
