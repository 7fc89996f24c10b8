"""Routes that vLLM has beyond OpenAI's."""
