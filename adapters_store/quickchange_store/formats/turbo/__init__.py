"""Directories of Turbo heads: Medusa's layouts, vLLM's, and Quickchange's own."""
