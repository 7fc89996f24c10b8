"""Response models of /v1/responses: the response, its items, and the events of a stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from quickchange_server.api.openapi.response_models import (
    ChatTokenLogprob,
    ChosenVariant,
    ResponseModel,
)
from quickchange_server.frontend.request_base import FunctionName

ItemStatus = Literal["in_progress", "completed", "incomplete"]

# --- items --------------------------------------------------------------------------------------


class OutputText(ResponseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]  # none
    logprobs: list[ChatTokenLogprob] = Field(default=[])


class OutputRefusal(ResponseModel):
    type: Literal["refusal"]
    refusal: str


class InputText(ResponseModel):
    type: Literal["input_text"]
    text: str


class ReasoningText(ResponseModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(ResponseModel):
    type: Literal["summary_text"]
    text: str


class OutputMessage(ResponseModel):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText | OutputRefusal]


class OutputCall(ResponseModel):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(ResponseModel):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]


OutputItem = Annotated[OutputMessage | OutputCall | OutputReasoning, Field(discriminator="type")]


class GivenMessage(ResponseModel):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["system", "developer", "user", "assistant"]
    content: list[InputText | OutputText | OutputRefusal]


class GivenOutput(ResponseModel):
    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str


class GivenReasoning(ResponseModel):
    id: str
    type: Literal["reasoning"]
    summary: list[SummaryText]
    content: list[ReasoningText]


class GivenItems(ResponseModel):
    object: Literal["list"]
    data: list[GivenMessage | OutputCall | GivenOutput | GivenReasoning | OutputReasoning]
    first_id: str | None
    last_id: str | None
    has_more: bool


# --- the response -------------------------------------------------------------------------------


class ResponseFailure(ResponseModel):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(ResponseModel):
    reason: Literal["max_output_tokens"]


class InputTokensDetails(ResponseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseModel):
    reasoning_tokens: int
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class ResponseUsage(ResponseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class AskedReasoning(ResponseModel):
    effort: str | None
    summary: str | None


class AskedFunction(ResponseModel):
    type: Literal["function"]
    name: FunctionName
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class OpenAIResponse(ResponseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: Literal[False]
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: AskedReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[AskedFunction]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    quickchange: ChosenVariant | None = None  # only where `model` names an experiment


class DeletedResponse(ResponseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


# --- events -------------------------------------------------------------------------------------


class _NumberedEvent(ResponseModel):
    sequence_number: int


class ResponseLifeEvent(_NumberedEvent):
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: OpenAIResponse


class OutputItemEvent(_NumberedEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _ItemPlace(_NumberedEvent):
    item_id: str
    output_index: int


class _ContentPlace(_ItemPlace):
    content_index: int


class ContentPartEvent(_ContentPlace):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class TextDeltaEvent(_ContentPlace):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDoneEvent(_ContentPlace):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChatTokenLogprob]


class ReasoningDeltaEvent(_ContentPlace):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDoneEvent(_ContentPlace):
    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDeltaEvent(_ItemPlace):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_ItemPlace):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ResponseErrorEvent(_NumberedEvent):
    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


ResponseStreamEvent = (
    ResponseLifeEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ResponseErrorEvent
)
