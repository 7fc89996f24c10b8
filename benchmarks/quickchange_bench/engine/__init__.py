"""Measurements of the engine: step times, drafts, loss by dtype."""
