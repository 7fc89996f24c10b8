"""Parsers of text as it comes: stop strings, tool calls, the parts of a message."""
