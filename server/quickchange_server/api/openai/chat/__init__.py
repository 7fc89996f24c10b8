"""OpenAI's chats: bodies, tools, the route and its answers."""
