from quickchange_server.entrypoints.llm import LLM as LLM
from quickchange_server.protocol import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]
