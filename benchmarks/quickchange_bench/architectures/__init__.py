"""A sweep over every causal language model type that transformers has: right, or refused."""
