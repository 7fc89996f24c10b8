"""Batched low-rank products: the contract, plain torch, Triton and its tuning."""
