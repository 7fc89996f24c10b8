"""Response models of the routes for generation, models and tokens. docs/http.md has the meanings.

For routes that return a `Response` of their own the models are documentation, checked by tests. For
the others FastAPI validates answers against them and refuses extra fields.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from quickchange_server.frontend.request_base import FunctionName

ExperimentState = Literal["running", "paused", "stopped"]


class ResponseModel(BaseModel):
    """Base of all response models; extra fields are refused."""

    model_config = ConfigDict(extra="forbid")


# --- errors -------------------------------------------------------------------------------------


class ErrorDetails(ResponseModel):
    message: str
    type: str
    param: str | None  # path of the wrong field
    code: str | None


class ErrorBody(ResponseModel):
    """An error in OpenAI's form."""

    error: ErrorDetails


class LoraxErrorBody(ResponseModel):
    """An error in LoRAX's form."""

    error: str
    error_type: str


# --- OpenAI -------------------------------------------------------------------------------------


class ChosenVariant(ResponseModel):
    """The experiment that `model` names and the variant assigned to the request."""

    experiment: str
    variant: str


class PromptTokensDetails(ResponseModel):
    cached_tokens: int


class CompletionTokensDetails(ResponseModel):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None
    reasoning_tokens: int | None = None


class CompletionUsage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class GenerationEnvelope(ResponseModel):
    """Fields that whole answers and streamed events share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    quickchange: ChosenVariant | None = None


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(ResponseModel):
    logprob: float
    rank: int | None
    decoded_token: str


class StoppedChoice(ResponseModel):
    """vLLM's fields of a choice."""

    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ReportedPrompt(ResponseModel):
    """vLLM's fields about a prompt."""

    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(StoppedChoice, ReportedPrompt):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(GenerationEnvelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class FunctionCall(ResponseModel):
    name: FunctionName
    arguments: str


class AssistantToolCall(ResponseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(ResponseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None  # of models whose chat template marks thoughts
    reasoning_content: str | None = None  # the same
    tool_calls: list[AssistantToolCall] | None = None


class ChatChoice(StoppedChoice):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(GenerationEnvelope, ReportedPrompt):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class CompletionChunk(GenerationEnvelope):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class ToolCallDelta(AssistantToolCall):
    index: int


class ChatDelta(ResponseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(StoppedChoice):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatCompletionChunk(GenerationEnvelope):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None  # of the first event
    usage: CompletionUsage | None = None


class ModelDetails(ResponseModel):
    kind: Literal["base", "adapter", "version", "alias", "experiment"]
    version: int | None = None
    digest: str | None = None
    turbo: str | None = None
    classifier: bool | None = None
    activated: bool | None = None
    state: ExperimentState | None = None


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    quickchange: ModelDetails


class ModelList(ResponseModel):
    object: Literal["list"]
    data: list[ModelCard]


# --- LoRAX --------------------------------------------------------------------------------------


class LoraxAlternativeToken(ResponseModel):
    id: int
    text: str
    logprob: float


class LoraxToken(LoraxAlternativeToken):
    special: bool
    skipped: bool
    alternative_tokens: list[LoraxAlternativeToken] | None = None


class TgiToken(LoraxAlternativeToken):
    special: bool


class LoraxPrefillToken(ResponseModel):
    id: int
    text: str
    logprob: float | None


class LoraxEnding(ResponseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    skipped_tokens: int
    seed: int | None


class LoraxTokenDetails(LoraxEnding):
    prefill: list[LoraxPrefillToken]
    tokens: list[LoraxToken]
    top_tokens: list[list[TgiToken]] | None = None


class LoraxSequence(LoraxTokenDetails):
    generated_text: str


class LoraxDetails(LoraxTokenDetails):
    prompt_tokens: int
    best_of_sequences: list[LoraxSequence] | None = None


class LoraxGeneration(ResponseModel):
    generated_text: str
    details: LoraxDetails | None = None


class LoraxStreamDetails(LoraxEnding):
    prompt_tokens: int
    input_length: int


class LoraxStreamEvent(ResponseModel):
    index: int
    token: LoraxToken
    top_tokens: list[TgiToken] | None = None
    generated_text: str | None  # in the last event
    details: LoraxStreamDetails | None  # in the last event


class LoraxInfo(ResponseModel):
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    max_client_batch_size: int
    eager_prefill: bool
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None


# --- vLLM ---------------------------------------------------------------------------------------


class TokenizedPrompt(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class RenderedPrompt(ResponseModel):
    """A prompt as the engine would get it, with the sampling parameters of its request."""

    request_id: str
    token_ids: list[int]
    token_offsets: list[tuple[int, int]] | None
    sampling_params: dict[str, JsonValue]
    model: str
    stream: bool
    stream_options: dict[str, bool] | None
    cache_salt: str | None
    priority: int


class TokenSpan(ResponseModel):
    """A token in LoRAX's answer of /tokenize."""

    id: int
    text: str
    start: int
    stop: int


class TokenizedChat(ResponseModel):
    """TGI's answer of /chat_tokenize."""

    tokenize_response: list[TokenSpan]
    templated_text: str


class DetokenizedText(ResponseModel):
    prompt: str


class TokenizerInfo(ResponseModel):
    """A tokenizer's configuration; what it does not have is null."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    additional_special_tokens: list[str]
    added_tokens_decoder: dict[str, str]  # by token id
    chat_template: str | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    clean_up_tokenization_spaces: bool | None
    padding_side: str
    truncation_side: str


class ServerLoad(ResponseModel):
    server_load: int


class ServerVersion(ResponseModel):
    version: str


class ReplicaCounts(ResponseModel):
    """Engine replicas of a cluster."""

    ready: int
    wanted: int


class EngineState(ResponseModel):
    state: str
    replicas: ReplicaCounts | None = None  # in a cluster alone
    store: str | None = None  # its trouble, where it has one
