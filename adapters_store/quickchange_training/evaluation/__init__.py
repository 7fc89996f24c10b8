"""Scores of answers against references, and their report. Runs nothing: no model, no server."""
