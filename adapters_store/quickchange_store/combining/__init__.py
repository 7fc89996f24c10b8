"""Adapters made of stored adapters: merges, and sums under a name."""
