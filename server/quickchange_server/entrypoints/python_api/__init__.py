"""What a call of the Python API is given: prompts, and adapters by name."""
