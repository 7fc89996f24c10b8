"""OpenAI's responses, /v1/responses: translated into chats, told as items and events."""
