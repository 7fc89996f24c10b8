"""Loads a base model and makes it ready to be served."""
