"""Body of OpenAI's chats, with vLLM's extra fields: messages, tools, and what an answer may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SkipValidation, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.api.openai.chat.tool_requests import (
    ECHOED,
    MAX_TOOLS,
    MadeCall,
    Tool,
    ToolChoice,
    Tools,
    ValidText,
)
from quickchange_server.api.openai.requests import (
    REMOVE,
    SHARED,
    BestTokens,
    GenerationRequest,
    wrong,
)
from quickchange_server.frontend.request_base import (
    Body,
    Unsupported,
    asks_nothing,
    check_text,
)
from quickchange_server.frontend.templates.chat_template import MAX_ROLE, RESERVED, Rendering
from quickchange_server.frontend.tokenizer import LONG_TEXT

MAX_MESSAGES = 2_048  # OpenAI's limit
MESSAGE_LENGTH = 40  # characters that count for a message besides its content
MAX_PARTS = 2_048  # of one message's content
MAX_DOCUMENTS = 1_024
MOST_VARIABLES = 64  # of a chat template; fields of a document
MAX_VARIABLES = 64 * 1024  # characters of them
MAX_DEPTH = 32  # levels of one

# Remedies for unsupported fields
_TEXT_ONLY = "this server reads and writes text alone; remove it"
_RENDER = "render the chat yourself and use /v1/completions"

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PART_HINTS = ECHOED | {"type", "annotations", "id"}


def check_content(value: Any) -> str | list[str]:
    """A message's content: a string, or the texts of its parts."""
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, list) and len(value) > MAX_PARTS:
        raise PydanticCustomError("content", f"has more than {MAX_PARTS} parts; join them")
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    return [check_text(_part_text(part)) for part in value]


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
    SkipValidation[str | list[str]],
    BeforeValidator(check_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def _one_thought(value: Any) -> Any:
    """A message's fields with its thought under one name; servers use several, all the same."""
    if not isinstance(value, dict):
        return value
    kept = {name: one for name, one in value.items() if name not in _THOUGHTS[1:]}
    thoughts = [text for text in map(value.get, _THOUGHTS) if isinstance(text, str)][:1]
    content = value.get("content")
    if isinstance(content, list) and value.get("role") == "assistant":
        kept["content"] = [part for part in content if not _is_thought(part)]
        thoughts += [part["thinking"] for part in content if _is_thought(part)]
    return {**kept, "reasoning_content": "\n".join(thoughts)} if thoughts else kept


def _is_thought(part: Any) -> bool:
    """True for a part of a content that is a thought, in Mistral's and Anthropic's form."""
    thinks = isinstance(part, dict) and part.get("type") == "thinking"
    return thinks and isinstance(part.get("thinking"), str)


class Message(Body):
    """One message of a chat."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "function_call": Unsupported("use tool_calls"),
        "refusal": Unsupported("put the refusal into content", ("",)),
        "audio": Unsupported(_TEXT_ONLY),
    }
    # What servers put beside a message, and clients send back with it.
    hints = ECHOED | {"annotations", "parsed", "reasoning_details"}

    role: Annotated[str, Field(min_length=1, max_length=MAX_ROLE)]
    content: Content | None = None
    name: str | None = None  # passed to the chat template
    reasoning_content: str | None = (
        None  # passed to templates that read it; `reasoning` is its alias
    )
    tool_calls: list[MadeCall] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str | None = None

    @property
    def about_tools(self) -> bool:
        return bool(self.tool_calls) or self.role == "tool"

    @property
    def text(self) -> str:
        """The content as one string."""
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(content)

    def for_template(self) -> dict[str, Any]:
        content = self.content or ""
        message: dict[str, Any] = {
            "role": self.role,
            "content": content
            if isinstance(content, str)
            else [{"type": "text", "text": text} for text in content],
        }
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content:
            message["reasoning"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    @model_validator(mode="before")
    @classmethod
    def _name_thoughts(cls, value: Any) -> Any:
        return _one_thought(value)

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.content is None and self.role in ("system", "developer", "user"):
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
    said = sum(
        len(message.text) + len(message.reasoning_content or "") + MESSAGE_LENGTH
        for message in messages
    )
    called = sum(len(c.function.arguments) for message in messages for c in message.tool_calls)
    return said + called + (LONG_TEXT if tools else 0)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


# --- how a chat is rendered ----------------------------------------------------------------------


def _check_variables(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("variables", "must be an object of the template's variables")
    for name in RESERVED & value.keys():
        raise PydanticCustomError("variables", "is set by the server; remove it", {"field": name})
    size, parts = 0, [(value, 0)]
    while parts:
        part, depth = parts.pop()
        size += len(check_text(part)) if isinstance(part, str) else 1
        if size > MAX_VARIABLES or depth > MAX_DEPTH:
            raise PydanticCustomError(
                "variables",
                "has more than {most} characters or {depth} levels; send less",
                {"most": MAX_VARIABLES, "depth": MAX_DEPTH},
            )
        if isinstance(part, dict):
            parts.extend((name, depth) for name in part)
            parts.extend((one, depth + 1) for one in part.values())
        elif isinstance(part, list):
            parts.extend((one, depth + 1) for one in part[:MAX_VARIABLES])
    return value


Variables = Annotated[
    dict[str, Any], BeforeValidator(_check_variables), Field(max_length=MOST_VARIABLES)
]
Document = Annotated[dict[str, ValidText], Field(max_length=MOST_VARIABLES)]
Documents = Annotated[list[Document], Field(max_length=MAX_DOCUMENTS, fail_fast=True)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRendering(Body):
    """The fields that say how a chat becomes a prompt."""

    add_generation_prompt: bool | None = None  # default: unless continue_final_message
    continue_final_message: bool = False
    chat_template_kwargs: Variables = Field(default={})
    documents: Documents = Field(default=[])
    reasoning_effort: Effort | None = None

    @property
    def how(self) -> Rendering:
        """The way to render the chat."""
        variables = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        begins = self.add_generation_prompt
        return Rendering(
            not self.continue_final_message if begins is None else begins,
            self.continue_final_message,
            self.documents,
            variables,
        )

    @property
    def rendered_length(self) -> int:
        """Characters, about, that these fields add to a chat."""
        documents = sum(len(text) for one in self.documents for text in one.values())
        return documents + sum(map(len, map(str, self.chat_template_kwargs.values())))

    @model_validator(mode="after")
    def _check_rendering(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong(
                "continue_final_message",
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True; "
                "set one of them",
            )
        return self


class ChatRequest(ChatRendering, GenerationRequest):
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
        "best_of": Unsupported("use n, and choose among the choices yourself", (1,)),
    }

    logprobs_field = "top_logprobs"

    messages: Messages
    echo: bool = False  # the last message's text stands before the answer's, if the role is its
    add_special_tokens: bool = False
    include_reasoning: bool = True
    tools: Tools = Field(default=[])
    tool_choice: ToolChoice = ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: BestTokens = 0

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def echoed(self) -> str:
        """What the answer's text begins with."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

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
