"""Virtual tokens of adapters, as the engine holds them."""
