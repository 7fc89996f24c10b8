"""What the routes answer, for the OpenAPI document; docs/http.md says what the fields mean.

Routes write their answers themselves, without a pass through these models: they are what tests
hold the answers against. No field may come that is not here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quickchange_server.frontend.caller import Scope
from quickchange_server.tenants.key import Limits

ExperimentState = Literal["running", "paused", "stopped"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- errors -------------------------------------------------------------------------------------


class ErrorDetails(Answer):
    message: str
    type: str
    param: str | None  # the place of the field that is wrong
    code: str | None


class Error(Answer):
    """An error, as OpenAI's API tells it."""

    error: ErrorDetails


class LoraxError(Answer):
    """An error, as LoRAX tells it."""

    error: str
    error_type: str


# --- OpenAI -------------------------------------------------------------------------------------


class Assigned(Answer):
    """The experiment that `model` named, and what it chose."""

    experiment: str
    variant: str


class PromptDetails(Answer):
    cached_tokens: int


class DraftDetails(Answer):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: DraftDetails | None = None


class Generated(Answer):
    """What every answer and every streamed event has."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    quickchange: Assigned | None = None


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(Answer):
    name: str
    arguments: str


class CalledTool(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class CompletionEvent(Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class StreamedTool(CalledTool):
    index: int


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[StreamedTool] | None = None


class ChatEventChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatEvent(Generated):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatEventChoice]
    usage: Usage | None = None


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    quickchange: Assigned | None = None


class ModelDetails(Answer):
    kind: Literal["base", "adapter", "version", "alias", "experiment"]
    version: int | None = None
    digest: str | None = None
    turbo: str | None = None
    state: ExperimentState | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    quickchange: ModelDetails


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


# --- LoRAX --------------------------------------------------------------------------------------


class LoraxAlternative(Answer):
    id: int
    text: str
    logprob: float


class LoraxToken(LoraxAlternative):
    special: bool
    skipped: bool
    alternative_tokens: list[LoraxAlternative] | None = None


class LoraxPrefill(Answer):
    id: int
    text: str
    logprob: float | None


class LoraxEnding(Answer):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    skipped_tokens: int
    seed: int | None


class LoraxTold(LoraxEnding):
    prefill: list[LoraxPrefill]
    tokens: list[LoraxToken]


class LoraxSequence(LoraxTold):
    generated_text: str


class LoraxDetails(LoraxTold):
    prompt_tokens: int
    best_of_sequences: list[LoraxSequence] | None = None


class LoraxAnswer(Answer):
    generated_text: str
    details: LoraxDetails | None = None


class LoraxStreamDetails(LoraxEnding):
    prompt_tokens: int


class LoraxEvent(Answer):
    token: LoraxToken
    generated_text: str | None  # in the last
    details: LoraxStreamDetails | None  # in the last


class LoraxInfo(Answer):
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None


# --- adapters -----------------------------------------------------------------------------------


class Residency(Answer):
    tier: Literal["device", "host", "disk"]
    bytes: int
    pinned: bool


class TurboFigures(Answer):
    depth: int
    sequential: bool
    vocabulary: int | None
    own_outputs: bool
    parameters: int
    medusa_1_ratio: float | None


class AdapterVersion(Answer):
    version: int
    digest: str
    created: int
    turbo: TurboFigures | None
    residency: Residency


class Served(AdapterVersion):
    """What a name serves."""

    id: str
    object: Literal["adapter"]


class Adapter(Served):
    versions: list[int]
    aliases: list[str]


class Adapters(Answer):
    object: Literal["list"]
    data: list[Adapter]


class AdapterFigures(Answer):
    architecture: str
    base_name: str
    ranks: list[int]
    targets: list[str]
    modules: int
    parameters: int
    dtypes: list[str]
    size: int
    source: dict[str, Any]
    kind: str
    base_hidden: int | None
    base_vocabulary: int | None


class DescribedAdapter(Served):
    aliases: list[str]
    current: int
    versions: list[AdapterVersion]
    info: AdapterFigures


class AddedAdapter(Answer):
    id: str
    object: Literal["adapter"]
    version: int
    digest: str
    created: int
    warnings: list[str]


class RemovedAdapter(Answer):
    id: str
    object: Literal["adapter.deleted"]
    deleted: Literal[True]
    versions: list[str]


class AdapterState(Answer):
    id: str
    version: int
    digest: str
    residency: Residency


class Alias(Answer):
    id: str
    object: Literal["alias"]
    target: str
    turbo: str | None


class Aliases(Answer):
    object: Literal["list"]
    data: list[Alias]


class RemovedAlias(Answer):
    id: str
    object: Literal["alias.deleted"]
    deleted: Literal[True]


# --- vLLM ---------------------------------------------------------------------------------------


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenSpan(Answer):
    """LoRAX's form."""

    id: int
    text: str
    start: int
    stop: int


class Detokenized(Answer):
    prompt: str


class ServerVersion(Answer):
    version: str


class State(Answer):
    state: str


# --- API keys -----------------------------------------------------------------------------------


class ApiKey(Answer):
    id: str
    object: Literal["api_key"]
    tenant: str
    scope: Scope
    label: str
    names: list[str]
    limits: Limits
    state: Literal["valid", "expired", "revoked"]
    created: float
    expires: float | None
    revoked: float | None
    old_secret_until: float | None


class NewApiKey(ApiKey):
    secret: str  # told once


class ApiKeys(Answer):
    object: Literal["list"]
    data: list[ApiKey]


class UsageRow(Answer):
    hour: int | None = None
    tenant: str | None = None
    key: str | None = None
    adapter: str | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    failed: int


class UsageReport(Answer):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    object: Literal["list"]
    begin: int = Field(alias="from")
    to: int
    group: list[str]
    data: list[UsageRow]
