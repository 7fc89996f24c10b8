"""Body of POST /v1/responses, with the extra fields that chats take.

What it shares with chats it inherits; `chat_translation.py` makes a chat of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.api.openai.chat.chat_requests import ChatRendering, Effort
from quickchange_server.api.openai.chat.tool_requests import (
    ECHOED,
    MAX_TOOLS,
    MODES,
    ChoiceOfTools,
    ValidText,
)
from quickchange_server.api.openai.requests import (
    MAX_LOGPROBS,
    REMOVE,
    SHARED,
    GenerationRequest,
    Schema,
)
from quickchange_server.api.responses.response_items import Input
from quickchange_server.frontend.request_base import Body, FunctionName, Name, Unsupported

_CHOICES = (
    'must be "none", "auto", "required", {"type": "function", "name": ...} or '
    '{"type": "allowed_tools", "mode": ..., "tools": [...]}'
)


def _check_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "tool",
            "{kind} is not served: this server runs no tools itself; declare a function, and run "
            "it in your program",
            {"kind": repr(kind), "field": "type"},
        )
    return value


class ResponseTool(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    hints = ECHOED

    type: Literal["function"]
    name: FunctionName
    description: ValidText | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(Body):
    type: Literal["function"]
    name: FunctionName


class ResponseToolChoice(ChoiceOfTools):
    """Who chooses to call: a string in the body, a function, or those of the tools that may be."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[Annotated[AllowedTool, BeforeValidator(_check_tool)]] = Field(
        default=[], max_length=MAX_TOOLS, fail_fast=True
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value in MODES:
            return {"type": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("tool_choice", _CHOICES)
        return value if value.get("type") in (*MODES, "allowed_tools") else _check_tool(value)

    @model_validator(mode="after")
    def _check_named(self) -> Self:
        if (self.name is None) == (self.type == "function"):
            raise PydanticCustomError(
                "tool_choice", "the type function has it, and no other", {"field": "name"}
            )
        if (not self.tools) == (self.type == "allowed_tools"):
            raise PydanticCustomError(
                "tool_choice", "the type allowed_tools has some, and no other", {"field": "tools"}
            )
        return self


class TextFormat(Body):
    """OpenAI's form of a constraint. A schema is always enforced, so `strict` changes nothing."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.schema_ is not None and self.type != "json_schema":
            raise PydanticCustomError(
                "text_format", "belongs to the type json_schema; remove it", {"field": "schema"}
            )
        return self


class TextOptions(Body):
    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None  # a hint


class ReasoningOptions(Body):
    """Wishes about reasoning, which a model's chat template may read."""

    hints = frozenset({"generate_summary", "context", "mode"})

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
LOGPROBS: Included = "message.output_text.logprobs"

_SENT = "send what it stands for in input"


class ResponseRequest(ChatRendering, GenerationRequest):
    """Body of POST /v1/responses."""

    hints = GenerationRequest.hints | {"access_programs", "prompt_cache_options"}
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SHARED,
        "response_format": Unsupported("use text.format"),
        "max_tokens": Unsupported("use max_output_tokens"),
        "max_completion_tokens": Unsupported("use max_output_tokens"),
        "messages": Unsupported("use input"),
        "n": Unsupported("a response has one answer; send several requests", (1,)),
        "logprobs": Unsupported(f'use include: ["{LOGPROBS}"]', (False,)),
        "background": Unsupported("stream the response, or wait for it", (False,)),
        "background_options": Unsupported("stream the response, or wait for it", ({},)),
        "conversation": Unsupported("use previous_response_id"),
        "prompt": Unsupported(_SENT),
        "context_management": Unsupported("use truncation, or shorten the input", ([],)),
        "moderation": Unsupported(REMOVE),
        "image": Unsupported("this server makes text alone; remove it"),
        "enable_response_messages": Unsupported(REMOVE, (False,)),
        "previous_input_messages": Unsupported(_SENT, ([],)),
        "reasoning_effort": Unsupported("use reasoning.effort"),
        "prompt_logprobs": Unsupported("use /v1/chat/completions"),
        "return_token_ids": Unsupported("use /v1/chat/completions", (False,)),
        "return_tokens_as_token_ids": Unsupported("use /v1/chat/completions", (False,)),
    }

    input: Input
    instructions: ValidText | None = None
    previous_response_id: Name | None = None
    store: bool = True  # where the setting store_responses is on
    tools: list[Annotated[ResponseTool, BeforeValidator(_check_tool)]] = Field(
        default=[], max_length=MAX_TOOLS, fail_fast=True
    )
    tool_choice: ResponseToolChoice = ResponseToolChoice(type="auto")
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = Field(None, ge=1)  # of tools that the server runs: of none
    text: TextOptions = TextOptions()
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    include: list[Included] = Field(default=[], max_length=16, fail_fast=True)
    reasoning: ReasoningOptions = ReasoningOptions()
    include_reasoning: bool = True  # vLLM's: reasoning is an item of the output
    truncation: Literal["disabled", "auto"] = "disabled"
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None  # a hint
    prompt_cache_key: str | None = None  # these are told back, and change nothing
    safety_identifier: str | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if LOGPROBS in self.include or self.top_logprobs else None

    @property
    def offered_tools(self) -> list[ResponseTool]:
        """The tools that the model may call, as the choice has them."""
        if self.tool_choice.type != "allowed_tools":
            return self.tools
        allowed = {tool.name for tool in self.tool_choice.tools}
        return [tool for tool in self.tools if tool.name in allowed]

    @model_validator(mode="after")
    def _check_allowed(self) -> Self:
        names = {tool.name for tool in self.tools}
        for index, tool in enumerate(self.tool_choice.tools):
            if tool.name not in names:
                raise PydanticCustomError(
                    "tool_choice",
                    "{name} is not among the tools",
                    {"name": repr(tool.name), "field": f"tool_choice.tools[{index}].name"},
                )
        return self
