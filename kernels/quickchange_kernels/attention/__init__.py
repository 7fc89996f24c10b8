"""Attention over a paged KV cache, and writing into it."""
