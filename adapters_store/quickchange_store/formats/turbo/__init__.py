"""Turbo heads on disk: Medusa's layouts, vLLM's, and this project's own."""
