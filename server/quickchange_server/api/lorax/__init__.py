"""LoRAX's routes, which are also those of text-generation-inference."""
