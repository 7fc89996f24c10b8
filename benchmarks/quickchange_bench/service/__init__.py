"""Measurements of the whole service over HTTP."""
