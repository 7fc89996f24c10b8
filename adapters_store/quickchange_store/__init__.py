"""Adapter versions on disk: formats, validation, publishing, training. No server, no GPU."""
