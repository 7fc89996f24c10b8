"""What the API process and the engine process say to each other.

Plain frozen data, pickled over one duplex channel. Token ids in, token ids out: this module knows
nothing of HTTP, of text or of tensors, so either side can be replaced (tests run the API against a
fake engine, and the engine without an API).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Interval

FinishReason = Literal["stop", "length", "cancelled", "error"]
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a client may say about the tokens and the text of its answer.

    The names and defaults are vLLM's. Each range stands beside its field and is checked here; the
    bodies of all routes, experiments' overrides and LoRAX's parameters are made from these fields.
    """

    n: Annotated[int, Interval(ge=1)] = 1  # choices
    temperature: Annotated[float, Interval(ge=0)] = 1.0  # 0 means greedy
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Interval(ge=-1)] = 0  # 0 and -1 mean off
    min_p: Annotated[float, Interval(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Interval(gt=0, le=1)] = 1.0  # Meister et al. 2022
    presence_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0  # over output, as OpenAI's
    frequency_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Interval(gt=0)] = 1.0  # over prompt and output
    max_tokens: Annotated[int | None, Interval(ge=0)] = 16  # new ones; None: all that fit
    min_tokens: Annotated[int, Interval(ge=0)] = 0  # nothing stops before this many new tokens
    stop: Sequence[str] = ()  # strings, kept as a tuple
    stop_token_ids: Collection[int] = frozenset()  # besides the end-of-sequence ids
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # what ended the text, string or token, is part of it
    skip_special_tokens: bool = True
    seed: Annotated[int | None, Interval(ge=-(2**63), lt=2**64)] = None  # None: drawn
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by token id
    logprobs: Annotated[int | None, Interval(ge=0)] = None  # n: the n best besides the sampled
    prompt_logprobs: Annotated[int | None, Interval(ge=0)] = None  # the same of the prompt's tokens

    def __post_init__(self) -> None:
        """Check all fields; keep lists, pairs and the single string as the types declared."""
        for name, (kind, interval) in _RANGES.items():
            _check_number(name, getattr(self, name), kind, interval)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: {self.min_tokens} exceeds max_tokens, {self.max_tokens}; lower it"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("stop: must be strings that are not empty; remove the others")
        kept = {
            "top_k": max(0, self.top_k),
            "stop": stops,
            "stop_token_ids": frozenset(self.stop_token_ids),
            "logit_bias": _summed(self.logit_bias),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def resolved(self, *, max_tokens: int, eos_ids: Iterable[int]) -> SamplingParams:
        """The parameters as the engine takes them: with a limit, and with every id that stops."""
        ends = () if self.ignore_eos else eos_ids
        stops = frozenset((*self.stop_token_ids, *ends))
        return replace(self, max_tokens=max_tokens, stop_token_ids=stops)

    @property
    def token_limit(self) -> int:
        """`max_tokens` where it is concrete, as in everything that reaches the engine."""
        if self.max_tokens is None:
            raise ValueError("max_tokens: is None; the engine needs a number")
        return self.max_tokens


def _summed(bias: Mapping[int, float] | Iterable[tuple[int, float]]) -> dict[int, float]:
    """A bias as a dict; pairs of one token count together."""
    totals: dict[int, float] = {}
    for token, value in bias.items() if isinstance(bias, Mapping) else bias:
        totals[token] = totals.get(token, 0.0) + value
    return totals


def _ranges() -> Iterator[tuple[str, tuple[Any, Interval]]]:
    """The type and the range of each field that holds a number."""
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, interval = get_args(hint)
            yield name, (kind, interval)


_RANGES = dict(_ranges())


def _check_number(name: str, value: Any, kind: Any, interval: Interval) -> None:
    if value is None and isinstance(None, kind):
        return
    whole = kind is not float
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not _inside(value, interval):
        what = "a whole number" if whole else "a number"
        bounds = " and ".join(
            f"{word} {bound}"
            for word, bound in (
                ("above", interval.gt),
                ("at least", interval.ge),
                ("at most", interval.le),
                ("below", interval.lt),
            )
            if bound is not None
        )
        raise ValueError(f"{name}: {value!r} is not {what} {bounds}; give one, or leave it out")


def _inside(value: Any, interval: Interval) -> bool:
    gt, ge, lt, le = interval.gt, interval.ge, interval.lt, interval.le
    return (
        (gt is None or value > gt)
        and (ge is None or value >= ge)
        and (lt is None or value < lt)
        and (le is None or value <= le)
    )


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
    sampling: SamplingParams  # resolved
    adapters: tuple[Component, ...] = ()  # empty: the plain base model
    output: tuple[int, ...] = ()
    drafting: Drafting | None = None  # None: no token is drafted
    constraint: Constraint | None = None  # None: any text
    salt: str = ""  # requests share cached prefixes only under equal salts
    background: bool = False  # runs on what other requests leave, and gives way to them
    pooling: Pooling | None = None  # an embedding of the prompt instead of new tokens
    seed: int = field(kw_only=True)  # a drawn token depends on it and its absolute position alone


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

    def ranked(self, most: int) -> dict[int, tuple[float, int | None]]:
        """The `most` best tokens and the position's own, each with its log-probability and rank
        from 1; None where the position's own is not among the best that are known."""
        ids = [token_id for token_id, _ in self.top]
        ranked: dict[int, tuple[float, int | None]]
        ranked = {token_id: (p, rank) for rank, (token_id, p) in enumerate(self.top[:most], 1)}
        own = ids.index(self.token_id) + 1 if self.token_id in ids else None
        ranked.setdefault(self.token_id, (self.logprob, own))
        return ranked


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
