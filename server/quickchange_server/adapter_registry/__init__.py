"""Adapter names resolved to digests, and the addition of adapters to the store."""
