"""Adapter versions on disk: formats, validation, publishing, merging. No server, no GPU."""
