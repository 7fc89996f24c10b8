"""vLLM's routes beyond OpenAI's."""
