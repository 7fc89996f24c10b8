"""API keys, their limits, and usage for billing."""
