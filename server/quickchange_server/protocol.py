"""Messages between the API process and the engine process, and the sampling parameters.

Plain frozen data, pickled over one duplex pipe. Token ids in, token ids out: HTTP, text and
tensors are not known here, so either side can be replaced (tests run the API against a fake
engine, and the engine without an API).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from annotated_types import Interval

MOST_TOKENS = 2**31 - 1  # no vocabulary has more
MOST_BIAS = 100  # of a logit, as OpenAI's
ALL = -1  # in a number of best tokens: the vocabulary's
MOST_LOGPROB_IDS = 128  # tokens whose log-probabilities are told wherever they rank, as vLLM's

FinishReason = Literal["stop", "length", "cancelled", "error"]
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request, with vLLM's names and defaults.

    Each range stands beside its field and is checked here; the request bodies of all routes,
    experiments' overrides and LoRAX's parameters are derived from these fields.
    """

    n: Annotated[int, Interval(ge=1, le=1024)] = 1  # choices
    temperature: Annotated[float, Interval(ge=0)] = 1.0  # 0 means greedy
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Interval(ge=-1, lt=2**63)] = 0  # 0, -1 and a vocabulary's size: off
    min_p: Annotated[float, Interval(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Interval(gt=0, le=1)] = 1.0  # Meister et al. 2022
    presence_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0  # over the output, as OpenAI's
    frequency_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Interval(ge=0.01, le=100)] = 1.0  # over prompt and output
    max_tokens: Annotated[int | None, Interval(ge=0)] = 16  # new tokens; None: all that fit
    min_tokens: Annotated[int, Interval(ge=0)] = 0  # new tokens before which nothing stops
    stop: Sequence[str] = ()  # kept as a tuple
    stop_token_ids: Collection[int] = frozenset()  # besides the end-of-sequence ids
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # keep the stop string or token in the text
    skip_special_tokens: bool = True
    seed: Annotated[int | None, Interval(ge=-(2**63), lt=2**64)] = None  # None: drawn at random
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by token id
    logprobs: Annotated[int | None, Interval(ge=ALL)] = None  # n best besides the sampled token
    prompt_logprobs: Annotated[int | None, Interval(ge=ALL)] = None  # n best at each prompt token
    logprob_token_ids: Collection[int] = ()  # with `logprobs`: of these tokens, not of the best
    allowed_token_ids: Collection[int] = frozenset()  # no other token is chosen; empty: any is
    bad_words: Sequence[str] = ()  # texts whose tokens are never completed

    def __post_init__(self) -> None:
        """Check all fields and normalise them: tuple, frozenset and dict, top_k -1 as 0.

        Raises ValueError that names the field.
        """
        for name, (kind, interval) in _RANGES.items():
            _check_number(name, getattr(self, name), kind, interval)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: {self.min_tokens} exceeds max_tokens, {self.max_tokens}; lower it"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("stop: must be strings that are not empty; remove the others")
        bad_words = tuple(self.bad_words)
        if isinstance(self.bad_words, str) or not all(
            isinstance(word, str) and word.strip() for word in bad_words
        ):
            raise ValueError("bad_words: must be a list of words that are not empty")
        kept: dict[str, Any] = {
            "top_k": max(0, min(self.top_k, MOST_TOKENS)),
            "stop": stops,
            "stop_token_ids": frozenset(self.stop_token_ids),
            "logit_bias": _summed(self.logit_bias),
            "logprob_token_ids": tuple(dict.fromkeys(self.logprob_token_ids)),
            "allowed_token_ids": frozenset(self.allowed_token_ids),
            "bad_words": bad_words,
        }
        if len(kept["logprob_token_ids"]) > MOST_LOGPROB_IDS:
            raise ValueError(
                f"logprob_token_ids: has more than {MOST_LOGPROB_IDS} tokens; list fewer"
            )
        if kept["logprob_token_ids"] and self.logprobs is None:
            raise ValueError("logprob_token_ids: only with logprobs; set it, or remove them")
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def resolved(
        self, *, max_tokens: int, eos_ids: Iterable[int], vocab_size: int
    ) -> SamplingParams:
        """The parameters as the engine takes them: a concrete limit, every stop token id, and a
        number of best tokens."""
        ends = () if self.ignore_eos else eos_ids
        stops = frozenset((*self.stop_token_ids, *ends))
        best, of_prompt = (
            vocab_size if count == ALL else count for count in (self.logprobs, self.prompt_logprobs)
        )
        return replace(
            self,
            max_tokens=max_tokens,
            stop_token_ids=stops,
            logprobs=best,
            prompt_logprobs=of_prompt,
        )

    @property
    def token_limit(self) -> int:
        """`max_tokens` of resolved parameters. Raises ValueError if it is None."""
        if self.max_tokens is None:
            raise ValueError("max_tokens: is None; the engine needs a number")
        return self.max_tokens


def _summed(bias: Mapping[int, float] | Iterable[tuple[int, float]]) -> dict[int, float]:
    """A bias as a dict; values for the same token are added up. Raises ValueError."""
    totals: dict[int, float] = {}
    for token, value in bias.items() if isinstance(bias, Mapping) else bias:
        if not 0 <= token < MOST_TOKENS or not -MOST_BIAS <= value <= MOST_BIAS:
            raise ValueError(
                f"logit_bias: {token!r}: {value!r} is not a token id with a number from "
                f"-{MOST_BIAS} to {MOST_BIAS}; correct it, or leave it out"
            )
        totals[token] = totals.get(token, 0.0) + value
    return totals


def _ranges() -> Iterator[tuple[str, tuple[Any, Interval]]]:
    """Name, type and range of each numeric field."""
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
    finite = number and (isinstance(value, int) or math.isfinite(value))
    if not finite or not _inside(value, interval):
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
    """One term of a composition Σ weightᵢ · adapterᵢ: an adapter version and its weight.

    Tokens at positions [begin, end) of the text take it: prompt and output, from 0. One version may
    have several terms, whose spans do not overlap: a weight that changes along the text.
    virtual_tokens: that the adapter puts in front of the text, where they take positions of the
    context; at most one term has any, at the weight 1 in all of the text.
    """

    digest: str
    weight: float = 1.0
    begin: int = 0
    end: int | None = None  # None: to the end of the text
    virtual_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Drafting:
    """Sources of a request's draft tokens, which the base model verifies."""

    heads: str | None = None  # digest of the adapter version whose Turbo heads draft
    lookup: bool = False  # also draft by prompt lookup, over prompt and output


@dataclass(frozen=True, slots=True)
class Constraint:
    """Grammar that the generated text must match; tokens that could not lead to it are masked."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    source: str = ""  # the schema as JSON, the regular expression, the grammar; "" for json_object
    # A Lark grammar of all of the text, in which `@answer` stands for what the rest describes.
    before: str = ""


# Who is at fault: an adapter that can't be loaded, the request, its adapters' weights, the server.
ErrorKind = Literal["adapter", "request", "weights", "internal"]
Pooling = Literal["mean", "last"]  # over the hidden states that enter the LM head


# --- API process to engine ---------------------------------------------------------------------


Prices = tuple[tuple[int, float], ...]  # (rows, seconds) of an engine step, ascending


@dataclass(frozen=True, slots=True)
class Begin:
    """Load the model: the first command. `prices`: as an earlier engine measured them; empty: the
    engine measures them itself, which takes longer than the rest of its start."""

    prices: Prices = ()


@dataclass(frozen=True, slots=True)
class Ping:
    """Say that the step loop still turns: a Pulse answers, after the step under way."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate one sequence. `output`: tokens already emitted, before an engine restart."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams  # resolved
    adapters: tuple[Component, ...] = ()  # empty: the plain base model
    output: tuple[int, ...] = ()
    drafting: Drafting | None = None  # None: no speculative decoding
    constraint: Constraint | None = None  # None: any text
    salt: str = ""  # requests share cached prefixes only under equal salts
    cache_salt: str = ""  # the same, and shares all else with requests under its `salt`
    bad_tokens: tuple[tuple[int, ...], ...] = ()  # `bad_words`, each as tokens that spell it
    background: bool = False  # uses only capacity that other requests leave
    pooling: Pooling | None = None  # embed the prompt instead of generating
    seed: int = field(kw_only=True)  # a sampled token depends on it and its position alone
    # Names for metrics and messages, of its adapters and of the adapter whose heads draft. What is
    # asked for is the same under other names.
    label: str = field(default="base", kw_only=True, compare=False)
    drafter: str | None = field(default=None, kw_only=True, compare=False)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that its adapters put in front of the text."""
        return sum([component.virtual_tokens for component in self.adapters])


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request and free its resources. No delta follows; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Load an adapter version to `tier` if its budget allows."""

    digest: str
    tier: Literal["device", "host"] = "device"


@dataclass(frozen=True, slots=True)
class Pin:
    """Pin an adapter version to the device, or unpin it (pinned=False)."""

    digest: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop an adapter version from both tiers once no running request uses it."""

    digest: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process now; requests in flight are dropped."""


Command = Begin | Ping | Submit | Cancel | Prefetch | Pin | Forget | Shutdown


# --- engine to API process ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine has loaded the model and accepts requests."""

    max_model_len: int  # tokens, prompt and output together
    kv_blocks: int
    block_size: int  # tokens
    load_seconds: float
    adapter_device_bytes: int  # budget of the device tier
    adapter_host_bytes: int
    prices: Prices = ()  # of steps without adapters; empty: nothing is drafted, so none are needed
    own_bytes: int = 0  # memory that it shares with no other process; 0: not known
    dtype: str = "float32"  # what the base computes in
    adapter_dtype: str = "float32"  # what adapters are held in
    memory: str = ""  # table of what takes how much, for people
    hidden_size: int = 0  # of the states that enter the LM head


class TokenLogprobs(NamedTuple):
    """The model's log-probabilities at one position, before penalties, bias and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first

    def best(self, most: int) -> tuple[tuple[int, float], ...]:
        """The `most` first of `top`; ALL: all of it."""
        return self.top if most == ALL else self.top[:most]

    def ranked(self, most: int) -> dict[int, tuple[float, int | None]]:
        """The `most` best tokens and this position's token, each with its log-probability and its
        rank from 1, which is None if the position's token is not in `top`."""
        ids = [token_id for token_id, _ in self.top]
        ranked: dict[int, tuple[float, int | None]]
        ranked = {token_id: (p, rank) for rank, (token_id, p) in enumerate(self.best(most), 1)}
        own = ids.index(self.token_id) + 1 if self.token_id in ids else None
        ranked.setdefault(self.token_id, (self.logprob, own))
        return ranked


class Delta(NamedTuple):
    """New tokens of one request; the last delta of a request carries `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if requested
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error": what went wrong and the remedy
    error_kind: ErrorKind | None = None
    # The first delta only: prompt tokens found in the prefix cache.
    cached_tokens: int | None = None
    queue_seconds: float | None = None  # the first delta only: arrival in the engine to first step
    drafted: int = 0  # draft tokens verified in the step that made this delta
    accepted: int = 0  # accepted draft tokens among token_ids
    # The first delta only, if requested: one for each token of the prompt but the first.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None  # float32 little-endian [H], in its request's only delta


class DraftCount(NamedTuple):
    """Drafted and accepted tokens of one drafter at one depth in one step."""

    drafter: str  # digest of the adapter version whose heads drafted, or LOOKUP
    depth: int  # position after the last verified token, from 1
    drafted: int
    accepted: int


LOOKUP = "lookup"  # DraftCount.drafter of drafts made by prompt lookup


class StepStats(NamedTuple):
    """Figures of one engine step, and totals since the engine started."""

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
    draft_rows: int = 0  # rows spent on drafts in this step
    draft_estimate: float = 0.0  # tokens that the drafts were expected to gain
    draft_gain: int = 0  # tokens that they gained
    mask_seconds: float | None = None  # for all token masks; None: no sequence was constrained
    late_compilations: int = 0  # kernels compiled since the engine was ready; total
    late_captures: int = 0  # graphs captured since the engine was ready; total

    def between_steps(self) -> StepStats:
        """The same state, and none of the step's figures."""
        return self._replace(
            seconds=0.0,
            rows=0,
            prefill_rows=0,
            sequences=0,
            adapters=0,
            drafts=(),
            draft_rows=0,
            draft_estimate=0.0,
            draft_gain=0,
            mask_seconds=None,
        )


class StepReport(NamedTuple):
    """The outcome of one engine step. It is sent as bare tuples, in a sixth of the time."""

    deltas: tuple[Delta, ...]
    stats: StepStats

    def __reduce__(self) -> tuple[Any, ...]:
        return _report_of, (tuple([tuple(delta) for delta in self.deltas]), tuple(self.stats))


def _report_of(deltas: Iterable[tuple[Any, ...]], stats: tuple[Any, ...]) -> StepReport:
    return StepReport(tuple([Delta._make(delta) for delta in deltas]), StepStats._make(stats))


@dataclass(frozen=True, slots=True)
class Began:
    """These requests are about to be worked on for the first time; sent before the work."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pulse:
    """The engine's state between steps: the answer to a Ping, and sent when the state changed
    without a step. The figures of a step are 0."""

    stats: StepStats


@dataclass(frozen=True, slots=True)
class AdapterMoved:
    """An adapter version reached `tier`, from a faster or a slower one."""

    digest: str
    tier: Tier
    reason: Literal["load", "evict", "forget"]
    seconds: float = 0.0  # duration of a load from the tier below
    bytes: int = 0  # bytes occupied on `tier`
    pinned: bool = False
    rank: int = 0  # the highest of its updates


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    """An adapter version could not be loaded or pinned, and has been unpinned.

    Requests that wait for a version that could not be loaded get an error delta.
    """

    digest: str
    error: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """The reason why the engine ends or could not start; its last report."""

    error: str
    setting: str | None = field(default=None)


Report = Ready | Began | StepReport | Pulse | AdapterMoved | AdapterFailed | Fatal
