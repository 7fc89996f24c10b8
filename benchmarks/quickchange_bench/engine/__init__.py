"""Measurements of the engine: steps, drafts, and what a dtype loses."""
