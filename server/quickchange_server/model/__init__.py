"""The base model: transformers with two seams, attention and adapted linears."""
