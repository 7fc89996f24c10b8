"""One sequence in the engine: its tokens, its KV blocks and what it reads of its own prompt.

Prompt rows are read in order and each once, also where the prompt is computed in chunks, or anew
after a preemption. Knows nothing of devices.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from quickchange_server.adapters.batch_segments import Components, Stretches
from quickchange_server.adapters.prompts.held_prompt import HeldPrompt
from quickchange_server.engine.scheduling.kv_cache_manager import block_key
from quickchange_server.model.architectures.position_scaling import PositionScaling
from quickchange_server.model.forward_context import ZERO_STATE
from quickchange_server.protocol import (
    Component,
    Drafting,
    FinishReason,
    Pooling,
    Submit,
    TokenLogprobs,
)
from quickchange_server.spec_decode.prompt_lookup import PromptLookup, WordLookup
from quickchange_server.spec_decode.step_view import HeadDrafts
from quickchange_server.structured_output.compiler import Matcher

logger = logging.getLogger(__name__)

NO_ROWS = range(0)
_VIRTUAL = -1  # a virtual token in block keys, which its adapter's digest tells from others
Doubles = npt.NDArray[np.float64]


class Planned(Protocol):
    """What belongs to one sequence in a step."""

    @property
    def sequence(self) -> Sequence: ...


Item = TypeVar("Item", bound=Planned)
Made = TypeVar("Made")


def fault_of(error: BaseException) -> str:
    """What is told of an error that belongs to one sequence. Raises the error again if it belongs
    to none: if it ends the process. The panics of native libraries are no Exception."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    logger.error("an error of one sequence, which ends alone", exc_info=error)
    return (
        f"the engine can't go on with this request ({type(error).__name__}: {error}); others are "
        "not affected, and sent again as it is it would end like this again"
    )


def isolated(
    items: Seq[Item], make: Callable[[Seq[Item]], Made], faults: dict[str, str]
) -> tuple[Seq[Item], Made | None]:
    """What `make` makes of the items, and the items that it is made of: without those for which,
    alone, `make` raises, whose request ids and errors are added to `faults`. None if none is left.

    `make` may be called several times. An error that no single item causes is raised.
    """
    try:
        return items, make(items)
    except BaseException as error:
        found: dict[str, str] = {}
        for item in items:
            try:
                make([item])
            except BaseException as own:
                found[item.sequence.request_id] = fault_of(own)
        if not found:
            raise error from None
        faults |= found
    sound = [item for item in items if item.sequence.request_id not in found]
    return sound, make(sound) if sound else None


class Reading:
    """Log-probabilities or an embedding that one request reads of its prompt.

    Row i is that of prompt token i, whose logits score token i + 1.
    """

    def __init__(self, length: int, top: int | None, pooling: Pooling | None) -> None:
        """length: tokens of the prompt. top: best tokens reported with each log-probability; None:
        an embedding is read, by `pooling`."""
        self.top = top
        self.done = length - 1 if pooling == "last" else 0  # rows before this one need no reading
        self._end = length if top is None else length - 1
        self._pooled = self._end - self.done
        self.sound = True  # False once NaN or infinity was read
        self._scores: list[TokenLogprobs] = []
        self._sum: Doubles | None = None

    @classmethod
    def of(cls, submit: Submit) -> Reading | None:
        """The reading that a submission needs; None if it needs none, or had it sent before."""
        if submit.pooling is not None:
            return cls(len(submit.prompt), None, submit.pooling)
        if submit.sampling.prompt_logprobs is None or submit.output:
            return None
        return cls(len(submit.prompt), submit.sampling.prompt_logprobs, None)

    @property
    def complete(self) -> bool:
        return self.done >= self._end

    @property
    def scores(self) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the prompt's tokens from the second on, as far as read."""
        return tuple(self._scores)

    @property
    def embedding(self) -> bytes | None:
        """float32 little-endian [H] once complete; None before, and for log-probabilities."""
        if self._sum is None or not self.complete:
            return None
        return (self._sum / self._pooled).astype("<f4").tobytes()

    def rows(self, first: int, count: int) -> range:
        """Rows to be read among [first, first + count), which may begin in front of the text."""
        return range(max(first, self.done), min(first + count, self._end))

    def add_scores(self, scores: Seq[TokenLogprobs]) -> None:
        """Append the log-probabilities of the next rows."""
        self.sound &= all(math.isfinite(score.logprob) for score in scores)
        self._scores += scores
        self.done += len(scores)

    def add_states(self, total: Doubles, rows: int) -> None:
        """Add the sum [H] of the next rows' hidden states."""
        self.sound &= bool(np.isfinite(total).all())
        self._sum = total if self._sum is None else self._sum + total
        self.done += rows


def composition_key(adapters: Seq[Component], salt: str = "") -> bytes:
    """Content key [16 bytes] of Σ weightᵢ · adapterᵢ: equal for equal compositions, wherever in
    the text their terms begin and end.

    Under different salts equal compositions have different keys. So neither cached blocks nor what
    is learned of drafts is shared between salts, and admission is fair over them: whoever has a
    salt of its own can't be slowed, sped up or watched through these.
    """
    secret = hashlib.blake2b(salt.encode(), digest_size=32).digest() if salt else b""
    digest = hashlib.blake2b(digest_size=16, key=secret)
    for name, weight in sorted({(c.digest, c.weight) for c in adapters}):
        digest.update(name.encode() + struct.pack("<d", weight))
    return digest.digest()


def compositions_along(adapters: Seq[Component]) -> list[tuple[int, tuple[Component, ...]]]:
    """(first position, terms) of each stretch of a text under one composition, the first from 0."""
    if all(term.begin == 0 and term.end is None for term in adapters):
        return [(0, tuple(adapters))]
    ends = {term.end for term in adapters if term.end is not None}
    found: list[tuple[int, tuple[Component, ...]]] = []
    for first in sorted({0, *(term.begin for term in adapters), *ends}):
        terms = tuple(t for t in adapters if t.begin <= first and (t.end is None or first < t.end))
        if not found or found[-1][1] != terms:
            found.append((first, terms))
    return found


def salted(key: bytes, salt: str) -> bytes:
    """The key itself without a salt, else one that no other salt gives."""
    if not salt:
        return key
    return hashlib.blake2b(salt.encode(), digest_size=16, key=key).digest()


class Border(NamedTuple):
    """A state that is to be kept: that after so many tokens, and the held row for it."""

    tokens: int
    row: int


@dataclass(eq=False)
class Sequence:
    """A request in the engine. `tokens` is prompt and output; everything else follows from it.

    Positions, rows and blocks count the virtual tokens in front of the text; `tokens` has none.
    """

    request: Submit
    arrival: float  # seconds, monotonic
    scaling: PositionScaling | None = None  # if the model scales positions by the text's length
    # Derived from the request.
    request_id: str = field(init=False)  # a field: it is read many times a step
    virtual: int = field(init=False)  # virtual tokens in front of its text
    _prompt: int = field(init=False)  # its length
    _end: int = field(init=False)  # positions, at most, by the request
    tokens: list[int] = field(init=False)
    key: bytes = field(init=False)  # key of its composition and salt
    reach: int = field(init=False)  # tokens of the text that its positions are scaled for, at least
    reading: Reading | None = field(init=False)  # None: it reads nothing of its prompt
    generates: bool = field(init=False)  # False: it ends once its prompt is computed
    drafting: Drafting | None = field(init=False)
    digests: list[str] = field(init=False)  # adapter versions that it needs on the device
    # (first position, terms) of the stretches of its text under one composition each
    compositions: list[tuple[int, tuple[Component, ...]]] = field(init=False)
    _needs_values: bool = field(init=False)  # what follows a token depends on which it is
    # Progress.
    head_drafts: HeadDrafts | None = None  # the latest
    lookup: PromptLookup | None = None  # over `tokens`, if drafting asks for it
    words: WordLookup | None = None  # the same by text, if the engine has a tokenizer
    matcher: Matcher | None = None  # if its text is constrained
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(
        default_factory=list
    )  # content keys of its full blocks, as far as needed
    # Leading positions whose keys and values are in `blocks`, or will be by a launched step.
    computed: int = 0
    # Tokens that launched steps sample and that have to be computed in their turn: they follow
    # `tokens`, and are scheduled like these.
    pending: int = 0
    # While it runs: the slots of its adapters in all of its text; where it has several stretches,
    # those of each.
    components: Components = ()
    stretches: Stretches = ()
    prompt: HeldPrompt | None = None  # its virtual tokens, while it runs
    # Leading positions that need no writing: of those in front, a cache's keys and values are
    # given to the blocks, and not computed.
    written: int = 0
    head_slot: int | None = None  # of its Turbo heads, while it runs
    token_row: int = 0  # where the pending one is among the latest step's sampled tokens
    committed: int = 0  # leading blocks offered to the prefix cache
    # State rows of its own, if the model has recurrent layers: the coming step leaves its states in
    # them, after the last row in the first, after each draft in those behind.
    states: list[int] = field(default_factory=list)
    kept_state: int | None = None  # held row of a kept state that is the one after `computed`
    border: Border | None = None  # state that the coming step leaves to be kept
    first_scheduled: float | None = None
    cached_tokens: int | None = None  # tokens found in the prefix cache at first admission
    begun: bool = False  # True once it was part of a step
    reported: bool = False  # True once a delta of it has left the engine

    def __post_init__(self) -> None:
        request = self.request
        self.request_id = request.request_id
        self._prompt = len(request.prompt)
        self.virtual = request.virtual_tokens
        self._end = self.virtual + self._prompt + request.sampling.token_limit
        self.tokens = [*request.prompt, *request.output]
        self.key = composition_key(request.adapters, request.salt)
        self.compositions = compositions_along(request.adapters)
        self.reach = self.virtual + len(request.prompt)
        if self.outgrown:
            self.reach = self.length
        self.reading = Reading.of(request)
        # A request for its prompt's log-probabilities alone has no new token.
        more = self.reading is None or request.sampling.token_limit > 0
        self.generates = request.pooling is None and more
        # Drafts buy speed with rows: nobody waits for a background request, others need the rows.
        self.drafting = request.drafting if self.generates and not request.background else None
        heads = () if self.heads is None else (self.heads,)
        self.digests = list(dict.fromkeys([*(c.digest for c in request.adapters), *heads]))
        sampling = request.sampling
        self._needs_values = (
            request.constraint is not None
            or self.drafting is not None
            or bool(request.bad_tokens)
            or sampling.repetition_penalty != 1.0
            or sampling.frequency_penalty != 0.0
            or sampling.presence_penalty != 0.0
        )

    @property
    def output(self) -> list[int]:
        return self.tokens[self._prompt :]

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self._prompt

    @property
    def length(self) -> int:
        """Positions of its text so far, with the virtual tokens in front."""
        return self.virtual + len(self.tokens)

    @property
    def remaining(self) -> int:
        """Positions still to be computed before the next token can be sampled."""
        return self.virtual + len(self.tokens) + self.pending - self.computed

    def ids(self, first: int, count: int) -> list[int]:
        """Token ids at `count` positions, as far as known; 0 for a virtual token."""
        begin = first - self.virtual
        if begin >= 0:
            return self.tokens[begin : begin + count]
        return [0] * min(-begin, count) + self.tokens[: max(begin + count, 0)]

    def virtual_rows(self, count: int) -> range:
        """Positions of virtual tokens that a step with the next `count` rows has to be given."""
        if self.prompt is not None and self.prompt.cached:
            return range(self.written, self.virtual)
        end = min(self.computed + count, self.virtual)
        return range(self.computed, end) if self.computed < end else NO_ROWS

    def start_behind(self, cached: int) -> None:
        """Begin behind `cached` positions that were found, and behind a cache in front of them."""
        given = self.virtual if self.prompt is not None and self.prompt.cached else 0
        self.written = min(cached, self.virtual)
        self.computed = max(cached, given)

    @property
    def text_computed(self) -> int:
        """Leading tokens of the text that are computed, or will be by a launched step."""
        return max(self.computed - self.virtual, 0)

    @property
    def needs_its_tokens(self) -> bool:
        """True if no row can be made before the tokens in flight are known: its masks, penalties
        or drafts follow from them, or all is computed anew behind them."""
        return self._needs_values or self.outgrown

    def goes_on_behind(self, length: int, max_model_len: int) -> bool:
        """True if a text of `length` positions may have another one."""
        return length < max_model_len and length < self._end

    @property
    def state(self) -> int:
        """Row of the state after `computed` tokens."""
        if self.kept_state is not None:
            return self.kept_state
        return self.states[0] if self.computed else ZERO_STATE

    @property
    def reusable(self) -> int:
        """Leading positions that need not be computed if their keys and values are cached."""
        known = self.length - 1  # the last one's hidden state gives the next token
        if self.reading is None or self.reading.complete:
            return known
        return min(known, self.virtual + self.reading.done)

    @property
    def queue_seconds(self) -> float | None:
        """Seconds from arrival to the first step; None before that."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def heads(self) -> str | None:
        """Digest of the adapter version whose Turbo heads draft for the sequence."""
        return None if self.drafting is None else self.drafting.heads

    @property
    def outgrown(self) -> bool:
        """True if all is to be computed anew, as its tokens are too many for their reach."""
        scaling = self.scaling
        if scaling is None or not scaling.anew:
            return False
        return scaling.kind(self.reach) != scaling.kind(self.length + self.pending)

    @property
    def room_in_reach(self) -> int:
        """Most tokens that may follow before all is computed anew."""
        scaling = self.scaling
        if scaling is None or not scaling.anew or scaling.kind(self.reach):
            return sys.maxsize
        return scaling.limit - self.length

    def begin_anew(self) -> None:
        """Scale positions for the text as it is now. No token may count as computed."""
        self.reach = self.length
        self.block_keys.clear()

    def keys_of_full_blocks(self, count: int, block_size: int) -> list[bytes]:
        """Content keys of the first `count` full blocks."""
        while len(self.block_keys) < count:
            index = len(self.block_keys)
            parent = self.block_keys[-1] if index else self._first_parent()
            begin, end = index * block_size, (index + 1) * block_size
            for first, terms in self.compositions[1:]:
                if begin <= self.virtual + first < end:
                    parent = self._border_key(parent, self.virtual + first - begin, terms)
            self.block_keys.append(block_key(parent, self._key_tokens(index, block_size)))
        return self.block_keys[:count]

    def _key_tokens(self, index: int, block_size: int) -> list[int]:
        """The tokens of a full block as its key has them."""
        begin = index * block_size - self.virtual
        if begin >= 0:
            return self.tokens[begin : begin + block_size]
        return [_VIRTUAL] * min(-begin, block_size) + self.tokens[: max(begin + block_size, 0)]

    def _first_parent(self) -> bytes:
        """What the first block follows: the composition that the text begins under, so that texts
        share blocks up to where their compositions part."""
        kind = 0 if self.scaling is None else self.scaling.kind(self.reach)
        _, terms = self.compositions[0]
        own = salted(composition_key(terms, self.request.salt), self.request.cache_salt)
        return block_key(own, [kind]) if kind else own

    def _border_key(self, parent: bytes, offset: int, terms: Seq[Component]) -> bytes:
        """What a block follows in which another composition begins, `offset` tokens behind its
        first."""
        content = struct.pack("<q", offset) + composition_key(terms, self.request.salt)
        return hashlib.blake2b(content, key=parent, digest_size=16, person=b"border").digest()

    def take(self, token: int) -> None:
        """Append the next token of the output."""
        self.tokens.append(token)
        if self.matcher is not None and token not in self.request.sampling.stop_token_ids:
            self.matcher.advance(token)

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Reason why a sequence that generates has ended; None if it goes on."""
        if not self.generates:
            return None
        length, tokens = self.length, self.tokens
        if len(tokens) > self._prompt and tokens[-1] in self.request.sampling.stop_token_ids:
            return "stop"
        if self.matcher is not None and self.matcher.complete:
            return "stop"  # before min_tokens, too: nothing else may follow
        return None if self.goes_on_behind(length, max_model_len) else "length"

    @property
    def reason_without_output(self) -> FinishReason:
        """Reason why a sequence that doesn't generate ends, once its prompt is computed."""
        return "stop" if self.reading is not None and self.reading.top is None else "length"
