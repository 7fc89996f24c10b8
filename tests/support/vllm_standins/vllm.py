"""Stand-ins for the request and answer models of vLLM that `ray.llm` imports, and for nothing else.

`ray.serve.llm` can't be imported without vLLM's (or SGLang's) models, and vLLM is a CUDA build of
gigabytes. A process with this folder on its path (`PYTHONPATH`) imports `ray.serve.llm` as it is.
What matters here is as in vLLM: unknown fields are kept, a message's content is an iterable, a
request draws an id unless it is given one, answers have vLLM's required fields.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict


class OpenAIModel(BaseModel):
    model_config = ConfigDict(extra="allow")


class Message(TypedDict, total=False):
    role: str
    content: str | Iterable[dict[str, Any]] | None
    name: str
    tool_calls: Iterable[dict[str, Any]] | None
    tool_call_id: str


class RequestModel(OpenAIModel):
    model: str | None = None
    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)


class GenerationModel(RequestModel):
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = []


class ChatCompletionRequest(GenerationModel):
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class CompletionRequest(GenerationModel):
    prompt: list[int] | list[list[int]] | str | list[str] | None = None


class Usage(OpenAIModel):
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int | None = 0


class ChatChoice(OpenAIModel):
    index: int
    message: dict[str, Any]
    finish_reason: str | None = "stop"


class CompletionChoice(OpenAIModel):
    index: int
    text: str
    finish_reason: str | None = None


class ChatCompletionResponse(OpenAIModel):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionResponse(OpenAIModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletionStreamResponse(OpenAIModel):
    id: str


class CompletionStreamResponse(OpenAIModel):
    id: str


class EmbeddingCompletionRequest(RequestModel):
    input: list[int] | list[list[int]] | str | list[str]


class EmbeddingChatRequest(RequestModel):
    messages: list[Message]


class EmbeddingResponse(OpenAIModel):
    id: str = Field(default_factory=lambda: f"embd-{uuid.uuid4().hex}")
    object: str = "list"
    created: int = 0
    model: str
    data: list[dict[str, Any]]
    usage: Usage


class ScoreTextRequest(RequestModel):
    text_1: str | list[str]
    text_2: str | list[str]


class ScoreResponse(OpenAIModel):
    data: list[dict[str, Any]]


class ErrorInfo(OpenAIModel):
    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(OpenAIModel):
    error: ErrorInfo


class TokenizeCompletionRequest(OpenAIModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(OpenAIModel):
    model: str | None = None
    messages: list[Message]


class TokenizeResponse(OpenAIModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(OpenAIModel):
    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(OpenAIModel):
    prompt: str


class TranscriptionRequest(OpenAIModel):
    model: str | None = None


class TranscriptionResponse(OpenAIModel):
    text: str


class TranscriptionStreamResponse(OpenAIModel):
    id: str


for _place in (
    "openai.chat_completion",
    "openai.completion",
    "pooling.embed",
    "pooling.scoring",
    "serve.engine",
    "serve.tokenize",
    "speech_to_text.transcription",
):
    _name = "vllm.entrypoints"
    sys.modules[_name] = sys.modules[__name__]
    for _part in (*_place.split("."), "protocol"):
        _name = f"{_name}.{_part}"
        sys.modules[_name] = sys.modules[__name__]
