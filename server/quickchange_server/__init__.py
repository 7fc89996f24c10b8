"""Quickchange's server: HTTP surfaces, the engine process and what joins the two."""
