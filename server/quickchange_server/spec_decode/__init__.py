"""Speculative decoding: which tokens are drafted and verified, and what they bring."""
