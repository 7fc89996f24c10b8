"""LoRAX's routes (and so those of text-generation-inference), as its clients use them."""
