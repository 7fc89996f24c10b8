"""Anthropic's routes for messages: translations into chats, and of their answers."""
