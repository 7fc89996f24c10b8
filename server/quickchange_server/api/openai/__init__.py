"""OpenAI's routes, with vLLM's extra fields and this server's own."""
