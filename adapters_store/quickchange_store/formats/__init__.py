"""Readers of adapter directories as other tools write them; each gives the canonical form."""
