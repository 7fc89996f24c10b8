"""Adapters from where they lie: the hub, buckets, registries of containers."""
