"""Bodies of Anthropic's routes for messages, and the chats that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.adapter_registry.resolver import AUTO
from quickchange_server.api.anthropic.message_blocks import (
    Cacheable,
    Conversation,
    Text,
    Turn,
    system_text,
)
from quickchange_server.api.anthropic.message_errors import THREAD
from quickchange_server.api.error_responses import from_validation
from quickchange_server.api.openai.chat.chat_requests import (
    MAX_MESSAGES,
    MAX_PARTS,
    ChatRequest,
    Effort,
    Variables,
)
from quickchange_server.api.openai.chat.tool_requests import MAX_TOOLS, ValidText
from quickchange_server.api.openai.requests import Schema, wrong
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.request_base import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Adapters,
    Body,
    FunctionName,
    Json,
    Name,
    Number,
    Unsupported,
)

MIN_BUDGET = 1024  # Anthropic's, of thinking

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PLACE = re.compile(r"\bmessages\[(\d+)\]")


class MessageTool(Cacheable):
    """A function that the model may call."""

    # All tools are in every prompt, and pieces of a call's input come as the model writes them.
    hints = frozenset(
        {"defer_loading", "eager_input_streaming", "input_examples", "allowed_callers"}
    )

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: ValidText | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise PydanticCustomError(
                "tool",
                "{kind} is a tool of Anthropic's own, which this server does not have; give the "
                "tool's name, description and input_schema, and run it yourself",
                {"field": "type", "kind": repr(kind[:80])},
            )
        return value

    def for_chat(self) -> Json:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class MessageToolChoice(Body):
    """Who chooses to call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            said = "is required by the type tool" if self.name is None else "needs the type tool"
            raise PydanticCustomError("tool_choice", "{said}", {"field": "name", "said": said})
        return self

    def for_chat(self) -> str | Json:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return _CHOICES[self.type]


class Thinking(Body):
    """Wishes about reasoning. How long it gets is up to the model."""

    hints = frozenset({"block_binding"})

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=MIN_BUDGET)
    display: Literal["summarized", "omitted", "updates"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if (self.budget_tokens is not None) != (self.type == "enabled"):
            given = self.budget_tokens is not None
            said = "needs the type enabled" if given else "is required by the type enabled"
            context = {"field": "budget_tokens", "said": said}
            raise PydanticCustomError("thinking", "{said}", context)
        return self


class OutputFormat(Body):
    """A JSON schema that the answer's text fits."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")

    def for_chat(self) -> Json:
        named = {"name": "answer", "schema": self.schema_}
        return {"type": "json_schema", "json_schema": named}


class OutputConfig(Body):
    hints = frozenset({"task_budget"})

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessageSender(Body):
    """Who the request is for: an experiment may stick to it."""

    user_id: Annotated[ValidText, Field(max_length=512)] | None = None


class MessageBody(Cacheable):
    """What both routes take: all that the prompt is made of."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "container": Unsupported("this server runs no code; remove it"),
        "mcp_servers": Unsupported("connect to them yourself, and give their tools", ([],)),
        "compaction": Unsupported("shorten the messages yourself; remove it"),
        THREAD: Unsupported("no conversations are kept here; send all of its messages"),
        "prompt": Unsupported("/v1/messages takes messages; send the text as one"),
    }
    # Wishes about cost, place and memory. None changes what is answered here.
    hints = frozenset(
        {"service_tier", "speed", "inference_geo", "user_profile_id", "workspace_id"}
        | {"diagnostics", "context_management", "betas", "fallbacks"}
        | {"billing_policy", "fallback_credit_token"}
    )

    model: Annotated[Name, Field(min_length=1)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: ValidText | Annotated[list[Text], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field([])
    tool_choice: MessageToolChoice = MessageToolChoice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None  # an earlier name of output_config.format
    chat_template_kwargs: Variables = Field(default={})  # vLLM's

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat that this body means. Raises InvalidRequestError with the chat's field names,
        but for the places of messages."""
        written = self._conversation()
        body = {
            "messages": written.messages,
            "continue_final_message": written.ends_open,
            **self._fields(),
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            refused = from_validation(error.errors(), body)
            raise _placed(refused, written) from error

    @cached_property
    def marks_cache(self) -> bool:
        """True if the client marks a prefix to cache, and so wants to know what was cached."""
        parts: Iterator[Body] = iter((self, *self.tools, *self._blocks()))
        return any(isinstance(part, Cacheable) and part.cache_control for part in parts)

    def _blocks(self) -> Iterator[Body]:
        if not isinstance(self.system, str):
            yield from self.system
        for turn in self.messages:
            yield from turn.blocks

    def _conversation(self) -> Conversation:
        system = self.system if isinstance(self.system, str) else system_text(self.system)
        conversation = Conversation(system)
        for index, turn in enumerate(self.messages):
            conversation.add(index, turn)
        return conversation

    def _fields(self) -> Json:
        """The chat's fields besides its messages."""
        form = self.output_config.format or self.output_format
        thinking = self.thinking
        effort: Effort | None = self.output_config.effort
        if thinking is not None and thinking.type == "disabled":
            effort = "none"
        variables = dict(self.chat_template_kwargs)
        if thinking is not None and thinking.type == "enabled":
            variables.setdefault("enable_thinking", True)
        return {
            "model": self.model,
            "tools": [tool.for_chat() for tool in self.tools],
            "tool_choice": self.tool_choice.for_chat(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "response_format": None if form is None else form.for_chat(),
            "reasoning_effort": effort,
            "chat_template_kwargs": variables,
        }

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.output_config.format is not None and self.output_format is not None:
            raise wrong("output_format", "is another name of output_config.format; give one")
        assert self.chat is not None  # made here, where a large body is on a thread
        return self


class CountRequest(MessageBody):
    """Body of POST /v1/messages/count_tokens."""

    hints = MessageBody.hints | {  # what the other route takes besides; none is in the prompt
        *("max_tokens", "metadata", "stop_sequences", "stream"),
        *("temperature", "top_k", "top_p", "adapters", "turbo"),
    }


Stop = Annotated[ValidText, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class MessageRequest(MessageBody):
    """Body of POST /v1/messages; `adapters` and `turbo` are this server's own."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] = Field([])
    stream: bool = False
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**63)
    metadata: MessageSender = MessageSender()
    adapters: Adapters = Field(default=[])
    turbo: Name = AUTO

    def _fields(self) -> Json:
        user = self.metadata.user_id
        return {
            **super()._fields(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "user": user,
            "metadata": {} if user is None else {"user_id": user},
            "adapters": self.adapters,
            "turbo": self.turbo,
        }

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise wrong(
                "thinking.budget_tokens",
                f"{budget} must be less than max_tokens, {self.max_tokens}; lower it",
            )
        return self


def _placed(error: InvalidRequestError, written: Conversation) -> InvalidRequestError:
    """The error with the places of the client's own messages."""

    def place(found: re.Match[str]) -> str:
        origin = written.origins[int(found[1])]
        return "system" if origin is None else f"messages[{origin}]"

    param = None if error.param is None else _PLACE.sub(place, error.param)
    return InvalidRequestError(_PLACE.sub(place, error.message), param=param)
