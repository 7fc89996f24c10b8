"""Bodies of the routes that answer with vectors and classes: OpenAI's fields and vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from quickchange_server.api.openai.chat.chat_requests import ChatRendering, Messages
from quickchange_server.api.openai.requests import CompletionRequest, TruncationSide, wrong
from quickchange_server.api.pooling.vector_encodings import EmbedDtype, Endianness
from quickchange_server.frontend.request_base import Adapters, Body, Name, Prompt, Unsupported
from quickchange_server.frontend.templates.chat_template import Rendering
from quickchange_server.protocol import Pooling

MAX_ID = 512  # characters of a request's id
EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
Task = Literal["embed", "classify"]
_RENDER = "render the chat yourself and send it as input"

POOLING_UNSUPPORTED: Mapping[str, Unsupported] = {
    "priority": Unsupported("requests are served fairly over adapters; remove it", (0,)),
    "padding": Unsupported("prompts are read as they are; remove it", ("do_not_pad",)),
    "chat_template": Unsupported(_RENDER),
    "cache_salt": Unsupported("API keys part the tenants' caches; remove it"),
    "late_chunking_params": Unsupported("send the chunks as inputs of their own"),
}


class PooledRequest(Body):
    """What all of these bodies have: what serves them, and how prompts are cut."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = POOLING_UNSUPPORTED
    # Load generators ask every route for texts of one length; these generate none.
    hints = frozenset({"ignore_eos", "min_tokens"})

    model: Name | None = None
    adapters: Adapters = Field(default=[])
    user: str | None = None
    request_id: str | None = Field(None, max_length=MAX_ID)  # in the answer's id
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: TruncationSide | None = None
    use_activation: bool | None = None

    def as_completion(self, base: str) -> CompletionRequest:
        """A completion body with the same model, adapters and user, to select what serves it.

        base: the model where the body names none.
        """
        return CompletionRequest(
            model=base if self.model is None else self.model,
            prompt="",  # the input is checked already, and selects nothing
            adapters=self.adapters,
            turbo="off",  # nothing is drafted
            user=self.user,
        )


_FORMS: dict[str, list[JsonValue]] = {"input": ["string", "array"], "messages": ["array"]}


class TextRequest(ChatRendering, PooledRequest):
    """A body with texts: `input`, or a chat in `messages`, which ends with its last message."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": kind}}}
                for name, kind in _FORMS.items()
            ]
        }
    )

    input: Prompt | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # default: true for input, false for a chat

    @property
    def how(self) -> Rendering:
        return replace(super().how, add_generation_prompt=bool(self.add_generation_prompt))

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise wrong("input", "give either input or messages")
        for name in ChatRendering.model_fields:
            if getattr(self, name) and self.messages is None:
                raise wrong(name, "belongs to a chat; give messages, or remove it")
        return self


class EmbeddingRequest(TextRequest):
    """Body of POST /v1/embeddings."""

    encoding_format: EncodingFormat = "float"
    embed_dtype: EmbedDtype = "float32"  # of base64 and bytes
    endianness: Endianness = "native"
    dimensions: int | None = Field(None, ge=1)
    pooling: Pooling = "last"
    normalize: bool | None = None  # another name of use_activation

    @property
    def normalized(self) -> bool:
        """True if vectors have the length 1."""
        return self.normalize is not False and self.use_activation is not False

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        both = {self.normalize, self.use_activation} - {None}
        if len(both) > 1:
            raise wrong("use_activation", "differs from normalize; give one of the two")
        return self


_OF_TOKENS = "vectors of single tokens are not told; embed the parts of the text one by one"


class PoolingRequest(EmbeddingRequest):
    """Body of POST /pooling."""

    task: Task | None = None  # default: what the adapter was trained for

    @model_validator(mode="before")
    @classmethod
    def _known_task(cls, body: Any) -> Any:
        task = body.get("task") if isinstance(body, dict) else None
        if task in ("token_embed", "token_classify", "encode", "embed&token_classify"):
            raise wrong("task", f"Unsupported task: {task!r}; {_OF_TOKENS}")
        if task == "plugin" or (isinstance(body, dict) and "data" in body):
            raise wrong("task", "No IOProcessor plugin installed. Use embed or classify")
        return body


class ClassifyRequest(TextRequest):
    """Body of POST /classify; `inputs` is LoRAX's form, which is answered by its own refusal."""

    inputs: str | list[str] | None = Field(None, max_length=2**20)

    @model_validator(mode="before")
    @classmethod
    def _lorax_form(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("inputs") is not None:
            return {"inputs": body["inputs"], "input": ""}
        return body
