"""The model's tokenizer itself: as plain data, or as transformers' own where that is not enough."""
