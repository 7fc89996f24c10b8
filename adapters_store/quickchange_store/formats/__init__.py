"""Readers and writers of other tools' adapter directories."""
