"""Quickchange as the engine inside `ray.serve.llm`; docs/ray-serve-llm.md is its guide."""
