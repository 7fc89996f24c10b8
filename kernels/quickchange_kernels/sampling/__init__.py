"""Sampling, token masks, verification of drafts, and the random numbers behind them."""
