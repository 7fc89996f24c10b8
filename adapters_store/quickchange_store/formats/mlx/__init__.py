"""MLX-LM's adapters."""
