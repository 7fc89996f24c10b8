"""Response models of Anthropic's routes. docs/anthropic.md has the meanings."""

from __future__ import annotations

from typing import Any, Literal

from quickchange_server.api.openapi.response_models import ChosenVariant, ResponseModel
from quickchange_server.frontend.request_base import FunctionName

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class UnsupportedDetails(ResponseModel):
    error_code: Literal["thread_unsupported_request"]
    unsupported: list[str]


class MessageErrorDetails(ResponseModel):
    type: str
    message: str
    details: UnsupportedDetails | None = None


class MessageErrorBody(ResponseModel):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: MessageErrorDetails
    request_id: str | None = None  # not in a stream's event


class MessageText(ResponseModel):
    type: Literal["text"]
    text: str


class MessageThinking(ResponseModel):
    type: Literal["thinking"]
    thinking: str
    signature: str


class MessageToolUse(ResponseModel):
    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]


MessageBlock = MessageText | MessageThinking | MessageToolUse


class MessageUsage(ResponseModel):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageEnding(ResponseModel):
    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageObject(MessageEnding):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    usage: MessageUsage
    quickchange: ChosenVariant | None = None


class MessageStart(ResponseModel):
    type: Literal["message_start"]
    message: MessageObject


class MessagePing(ResponseModel):
    type: Literal["ping"]


class BlockStart(ResponseModel):
    type: Literal["content_block_start"]
    index: int
    content_block: MessageBlock


class TextDelta(ResponseModel):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(ResponseModel):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(ResponseModel):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(ResponseModel):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(ResponseModel):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(ResponseModel):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(ResponseModel):
    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessageUsage


class MessageStop(ResponseModel):
    type: Literal["message_stop"]


MessageEvent = (
    MessageStart | MessagePing | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
)


class TokenCount(ResponseModel):
    input_tokens: int


class AnthropicModel(ResponseModel):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModels(ResponseModel):
    data: list[AnthropicModel]
    has_more: Literal[False]
    first_id: str
    last_id: str
