"""Body of OpenAI's chats, with vLLM's extra fields: messages, tools, and what an answer may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.api.openai.chat.tool_requests import (
    ECHOED,
    MAX_TOOLS,
    MadeCall,
    Tool,
    ToolChoice,
    Tools,
)
from quickchange_server.api.openai.requests import (
    MAX_LOGPROBS,
    REMOVE,
    SHARED,
    GenerationRequest,
    wrong,
)
from quickchange_server.frontend.request_base import Body, Unsupported, asks_nothing
from quickchange_server.frontend.tokenizer import LONG_TEXT

MAX_MESSAGES = 2_048  # OpenAI's limit
MESSAGE_LENGTH = 40  # characters that count for a message besides its content
MAX_PARTS = 2_048  # of one message's content

# Remedies for unsupported fields
_TEXT_ONLY = "this server reads and writes text alone; remove it"
_RENDER = "render the chat yourself and use /v1/completions"

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PART_HINTS = ECHOED | {"type", "annotations", "id"}


def join_parts(value: Any) -> str:
    """A message's content as one string: itself, or its text parts joined by newlines."""
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError, which pydantic reports
        return value
    if isinstance(value, list) and len(value) > MAX_PARTS:
        raise PydanticCustomError("content", f"has more than {MAX_PARTS} parts; join them")
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    return join_parts("\n".join(map(_part_text, value)))


def _part_text(part: dict[str, Any]) -> str:
    kind = part.get("type")
    field = _TEXTS.get(kind) if isinstance(kind, str) else None
    text = None if field is None else part.get(field)
    if not isinstance(text, str):
        raise PydanticCustomError(
            "content",
            'supports parts of the form {"type": "text", "text": ...} only: '
            "this server reads no images, audio or files",
        )
    for name, value in part.items():
        if name not in (field, *_PART_HINTS) and not asks_nothing(value):
            raise PydanticCustomError(
                "content", "has a part with a field that is not known, {name}", {"name": name}
            )
    return text


_PART: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "text"},
        "text": {"type": "string"},
        "cache_control": {"description": "ignored: equal prefixes are cached by content"},
    },
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(join_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


_REASONING = frozenset({"reasoning", "reasoning_content", "reasoning_details"})


class Message(Body):
    """One message of a chat. The role `developer` is served as `system`."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "function_call": Unsupported("use tool_calls"),
        "refusal": Unsupported("put the refusal into content", ("",)),
        "audio": Unsupported(_TEXT_ONLY),
    }
    # What servers put beside a message, and clients send back with it.
    hints = ECHOED | {"annotations", "parsed"} | _REASONING

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None  # passed to the chat template
    tool_calls: list[MadeCall] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str | None = None

    @property
    def about_tools(self) -> bool:
        return bool(self.tool_calls) or self.role == "tool"

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise PydanticCustomError("missing", "is required", {"field": "content"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError(
                "message", "belong to the role assistant", {"field": "tool_calls"}
            )
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "message",
                "the role tool has it, and no other: the id of the call that it answers",
                {"field": "tool_call_id"},
            )
        return self


def chat_length(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """Characters of a chat, about; tools count as a long text whatever their size."""
    said = sum(len(message.content or "") + MESSAGE_LENGTH for message in messages)
    called = sum(len(c.function.arguments) for message in messages for c in message.tool_calls)
    return said + called + (LONG_TEXT if tools else 0)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SHARED,
        "functions": Unsupported("use tools", ([],)),
        "function_call": Unsupported("use tool_choice", ("none", "auto")),
        "audio": Unsupported(_TEXT_ONLY),
        "modalities": Unsupported(_TEXT_ONLY, (["text"],)),
        "web_search_options": Unsupported("this server searches nothing; remove it"),
        "moderation": Unsupported(REMOVE),
        "chat_template": Unsupported(_RENDER),
        "chat_template_kwargs": Unsupported(_RENDER, ({},)),
        "add_generation_prompt": Unsupported(_RENDER, (True,)),
        "continue_final_message": Unsupported(_RENDER, (False,)),
        "add_special_tokens": Unsupported("the chat template writes them; remove it", (False,)),
        "documents": Unsupported("put them into the messages", ([],)),
        "echo": Unsupported(REMOVE, (False,)),
        "best_of": Unsupported("use n, and choose among the choices yourself", (1,)),
    }

    messages: Messages
    tools: Tools = Field(default=[])
    tool_choice: ToolChoice = ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that the model may call."""
        return [] if self.tool_choice.type == "none" else self.tools

    @property
    def demanded_tools(self) -> list[Tool]:
        """Tools of which the answer must call one; empty if it need not."""
        chosen = self.tool_choice.function
        if chosen is not None:
            return [tool for tool in self.tools if tool.function.name == chosen.name]
        return self.tools if self.tool_choice.type == "required" else []

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise wrong("tools", "two functions have one name")
        chosen = self.tool_choice.function
        if chosen is not None and chosen.name not in names:
            raise wrong("tool_choice", f"{chosen.name!r} is not among the tools")
        if self.tool_choice.type == "required" and not self.tools:
            raise wrong("tool_choice", "required, and there are no tools; give some")
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise wrong("max_completion_tokens", "differs from max_tokens; give one of the two")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "only with logprobs set to true")
        return self
