"""Adapters on the device: rank pages, residency over tiers, segments of a batch."""
