"""What the API process and the engine process say to each other.

Plain frozen data, pickled over one duplex channel. Token ids in, token ids out: this module knows
nothing of HTTP, of text or of tensors, so either side can be replaced (tests run the API against a
fake engine, and the engine without an API).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is chosen.

    A sampled token depends on (seed, absolute position) alone, so `seed` is always concrete here:
    the API draws one where the client gave none.
    """

    seed: int
    max_tokens: int  # new tokens in all, those already in `Submit.output` included
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0  # 1 means off (Meister et al. 2022, as in transformers)
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over output only, as in OpenAI's API
    frequency_penalty: float = 0.0  # over output only
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0  # stop tokens are suppressed until this many new tokens
    stop_token_ids: frozenset[int] = frozenset()  # the end-of-sequence ids are in it unless ignored
    logprobs: int | None = None  # None: off; 0: the sampled token's only; n: the n best as well


@dataclass(frozen=True, slots=True)
class Component:
    """One adapter version of a composition: Σ weightᵢ · adapterᵢ."""

    digest: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Drafting:
    """How tokens of a request are drafted ahead of the base model, which verifies them."""

    heads: str | None = None  # digest of the adapter version whose Turbo heads draft
    lookup: bool = False  # also from what followed the same tokens earlier in prompt and output


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the generated text must be: every token that could not lead there is suppressed."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    source: str = ""  # the schema as JSON, the regular expression, the grammar; "" for json_object


Pooling = Literal["mean", "last"]  # of the hidden states that enter the LM head


# --- API process to engine ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate for one sequence. `output`: tokens already emitted (after an engine restart)."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[Component, ...] = ()  # empty: the plain base model
    output: tuple[int, ...] = ()
    drafting: Drafting | None = None  # None: no token is drafted
    constraint: Constraint | None = None  # None: any text
    salt: str = ""  # requests share cached prefixes only under equal salts
    background: bool = False  # runs on what other requests leave, and gives way to them
    prompt_logprobs: int | None = None  # as SamplingParams.logprobs, of the prompt's tokens
    pooling: Pooling | None = None  # an embedding of the prompt instead of new tokens


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request and free what it holds. No delta follows it. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Bring an adapter version to `tier` if its budget allows."""

    digest: str
    tier: Literal["device", "host"] = "device"


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep an adapter version on the device (pinned=True), or let it be evicted again."""

    digest: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop an adapter version from both tiers once no running request uses it."""

    digest: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process now; what is in flight is dropped."""


Command = Submit | Cancel | Prefetch | Pin | Forget | Shutdown


# --- engine to API process ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine has loaded the model and takes requests."""

    max_model_len: int  # tokens, prompt and output together
    kv_blocks: int
    block_size: int  # tokens
    load_seconds: float
    adapter_device_bytes: int  # budget of the device tier
    adapter_host_bytes: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own log-probabilities at one position: before penalties, bias and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one request; the last delta of a request carries `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token where asked for
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error": what went wrong and the remedy
    error_kind: Literal["adapter", "request", "internal"] | None = None
    cached_tokens: int | None = (
        None  # with the first delta: prompt tokens found in the prefix cache
    )
    queue_seconds: float | None = None  # with the first delta: arrival in the engine to first step
    drafted: int = 0  # draft tokens verified in the step that made this delta
    accepted: int = 0  # of token_ids, those that came from accepted drafts
    # With the first delta, where asked for: one for each token of the prompt but the first.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None  # float32 little-endian [H]; the only delta of its request


@dataclass(frozen=True, slots=True)
class DraftCount:
    """What one drafter's drafts at one depth came to in one step."""

    drafter: str  # digest of the adapter version whose heads drafted, or LOOKUP
    depth: int  # from 1: tokens after the one that was certain
    drafted: int
    accepted: int


LOOKUP = "lookup"  # DraftCount.drafter of drafts found earlier in prompt and output


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step and the totals since the engine started."""

    seconds: float
    rows: int  # token rows in the batch
    prefill_rows: int
    sequences: int  # in the batch
    adapters: int  # distinct adapter versions in the batch
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int  # unused by any sequence, kept for prefix hits
    prefix_hit_tokens: int  # total
    prefix_query_tokens: int  # total
    preemptions: int  # total
    drafts: tuple[DraftCount, ...] = ()
    draft_rows: int = 0  # rows bought for drafts in this step
    draft_estimate: float = 0.0  # tokens that they were expected to bring
    draft_gain: int = 0  # tokens that they brought
    mask_seconds: float | None = None  # of all constrained sequences; None: there were none


@dataclass(frozen=True, slots=True)
class StepReport:
    deltas: tuple[Delta, ...]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class AdapterMoved:
    """An adapter version reached `tier`, from a faster or a slower one."""

    digest: str
    tier: Tier
    reason: Literal["load", "evict", "forget"]
    seconds: float = 0.0  # for a load: from the tier below
    bytes: int = 0  # what it occupies on `tier`
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    """An adapter version could not be loaded, or not be pinned; it is unpinned by that.

    The requests that wait for one that could not be loaded get an error delta.
    """

    digest: str
    error: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine can't go on or could not start (a setting, the model): said before it ends."""

    error: str
    setting: str | None = field(default=None)


Report = Ready | StepReport | AdapterMoved | AdapterFailed | Fatal
