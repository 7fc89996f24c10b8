"""Constrained sequences: grammars compiled beside decoding, token masks for sampled rows.

A mask is made of the grammar's tokens, of the tokens that the request allows, or of both.

A `ConstraintCompiler`, which knows the tokenizer, says which tokens may follow; only token ids
appear here. A sequence waits outside the scheduler until its grammar is compiled, so that it delays
no other. One that arrives with output (after a restart) has the output replayed on its grammar.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache
from torch import Tensor

from quickchange_kernels.sampling.token_mask import WORD, mask_words, token_mask_
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence, fault_of
from quickchange_server.model.input_buffers import upload
from quickchange_server.protocol import Constraint, Submit
from quickchange_server.structured_output.compiler import ConstraintCompiler, Masked, Matcher
from quickchange_server.structured_output.errors import ConstraintError

_KEPT = 64  # compiled grammars
_ALL = -1  # a word that allows all of its tokens
_NONE_ALLOWED = (
    "allowed_token_ids: none of them can follow in a text that is constrained; allow more, or "
    "remove the constraint"
)
_NO_TOKEN = (
    "constraint: its text can only go on with tokens that end the output, and it is not complete; "
    "ask for other stop tokens"
)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Masks of a step's constrained sampled rows; there may be none."""

    rows: Tensor  # int64 [M] indices among the sampled rows
    bits: Tensor  # int32 [M, words]
    errors: dict[int, str]  # sampled row -> the reason why its grammar can't go on
    seconds: float | None  # spent on making them; None: there are none

    def moved(self, kept: Seq[bool]) -> TokenMasks:
        """The masks among more sampled rows, of which only the kept ones were asked for."""
        where = np.flatnonzero(kept)
        rows = torch.from_numpy(where[self.rows.numpy()])
        errors = {int(where[row]): error for row, error in self.errors.items()}
        return TokenMasks(rows, self.bits, errors, self.seconds)

    def apply_(self, logits: Tensor) -> None:
        """Suppress the forbidden tokens in logits [R, V], in place."""
        if self.rows.numel():
            token_mask_(logits, *upload((self.rows, self.bits), logits.device))


NO_MASKS = TokenMasks(
    torch.empty(0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.int32), {}, None
)


@dataclass(frozen=True, slots=True)
class _Waiting:
    sequence: Sequence
    matcher: Future[Matcher]


class Constraints:
    """The compile thread, the compiled grammars and the sequences that wait for one."""

    def __init__(
        self, compiler: ConstraintCompiler, vocabulary: int, on_wake: Callable[[], None]
    ) -> None:
        """on_wake: called on the compile thread when a grammar is ready or has failed."""
        self._compiler = compiler
        self._vocabulary = vocabulary
        self._on_wake = on_wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiled = LRUCache[Constraint, Matcher](_KEPT)  # in their initial states
        self._waiting: dict[str, _Waiting] = {}

    def refusal(self, submit: Submit) -> str | None:
        """None: every constraint may be asked for."""

    def hold(self, sequence: Sequence, constraint: Constraint) -> None:
        """Keep a sequence until its grammar is compiled; `released` then returns it."""
        made = self._thread.submit(self._make, constraint, tuple(sequence.output))
        self._waiting[sequence.request_id] = _Waiting(sequence, made)
        made.add_done_callback(lambda _: self._on_wake())

    def cancel(self, request_id: str) -> None:
        """Forget a sequence; compiling that has not begun is cancelled."""
        if (waiting := self._waiting.pop(request_id, None)) is not None:
            waiting.matcher.cancel()

    def released(self) -> list[tuple[Sequence, str | None]]:
        """Remove and return sequences whose grammar is ready (None) or has failed (the error)."""
        done = [one for one in self._waiting.values() if one.matcher.done()]
        released: list[tuple[Sequence, str | None]] = []
        for one in done:
            del self._waiting[one.sequence.request_id]
            error = one.matcher.exception()
            if error is None:
                one.sequence.matcher = one.matcher.result()
            elif not isinstance(error, ConstraintError):
                error = ConstraintError(fault_of(error))
            released.append((one.sequence, None if error is None else str(error)))
        return released

    def __len__(self) -> int:
        return len(self._waiting)

    def masks(self, sampling: Seq[Scheduled]) -> TokenMasks:
        """Masks of the sampling items' rows, in their order."""
        started = time.monotonic()
        wanted: list[Masked[Matcher]] = []
        stops: list[frozenset[int]] = []
        rows: list[int] = []
        errors: dict[int, str] = {}
        first = 0
        for item in sampling:
            matcher = item.sequence.matcher
            if matcher is not None:
                wanted.append(Masked(matcher, len(rows), item.drafts))
                stops.append(frozenset(item.sequence.request.sampling.stop_token_ids))
                rows += range(first, first + item.sampled_rows)
            first += item.sampled_rows
        if not wanted:
            return narrowed(NO_MASKS, sampling, self._vocabulary)
        bits = np.full((len(rows), mask_words(self._vocabulary)), _ALL, dtype=np.int32)
        self._compiler.fill(wanted, bits)
        for one, stop in zip(wanted, stops, strict=True):
            own = slice(one.row, one.row + 1 + len(one.drafts))
            if one.matcher.error is not None:
                errors |= dict.fromkeys(rows[own], one.matcher.error)
            else:
                self._allow_stops(bits[own], stop)
                empty = np.flatnonzero(~bits[own].any(axis=1))
                errors |= dict.fromkeys((rows[one.row + place] for place in empty), _NO_TOKEN)
        seconds = time.monotonic() - started
        made = TokenMasks(torch.tensor(rows), torch.from_numpy(bits), errors, seconds)
        return narrowed(made, sampling, self._vocabulary)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _allow_stops(self, bits: npt.NDArray[np.int32], stops: frozenset[int]) -> None:
        """Allow ending tokens exactly in rows whose text the grammar accepts as complete."""
        ends = self._compiler.ends
        accepts = (bits[:, [end // WORD for end in ends]] & _bits_of(ends)).any(axis=1)
        for token in ends | stops:
            word, bit = token // WORD, _bits_of([token])
            lawful = accepts if token in stops else np.zeros_like(accepts)
            bits[:, word] = np.where(lawful, bits[:, word] | bit, bits[:, word] & ~bit)

    def _make(self, constraint: Constraint, output: tuple[int, ...]) -> Matcher:
        """A matcher that has taken `output`. Runs on the compile thread, the cache's only user.

        Raises ConstraintError if the grammar does not allow `output`.
        """
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compiled[constraint] = self._compiler.compile(constraint)
        matcher = compiled.copy()
        for token in output:
            matcher.advance(token)
        if matcher.error is not None:
            raise ConstraintError(matcher.error)
        return matcher


class NoConstraints:
    """Null object of an engine without a tokenizer: constraints are refused."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def refusal(self, submit: Submit) -> str | None:
        if submit.constraint is None:
            return None
        return "constraint: this engine has no tokenizer to constrain text with; remove it"

    def hold(self, sequence: Sequence, constraint: Constraint) -> None:
        raise RuntimeError(f"{sequence.request_id} is constrained: {constraint.kind}")

    def cancel(self, request_id: str) -> None:
        """Do nothing: no sequence waits here."""

    def released(self) -> list[tuple[Sequence, str | None]]:
        return []

    def __len__(self) -> int:
        return 0

    def masks(self, sampling: Seq[Scheduled]) -> TokenMasks:
        return narrowed(NO_MASKS, sampling, self._vocabulary)

    def close(self) -> None:
        """Do nothing: there is no thread to end."""


def constraints_of(
    compiler: ConstraintCompiler | None, vocabulary: int, on_wake: Callable[[], None]
) -> Constraints | NoConstraints:
    """The engine's constraints. compiler: None if text can't be constrained."""
    if compiler is None:
        return NoConstraints(vocabulary)
    return Constraints(compiler, vocabulary, on_wake)


def narrowed(masks: TokenMasks, sampling: Seq[Scheduled], vocabulary: int) -> TokenMasks:
    """The masks with those tokens alone that the sampling items' requests allow."""
    started = time.monotonic()
    own: dict[int, npt.NDArray[np.int32]] = {}
    first = 0
    for item in sampling:
        allowed = item.sequence.request.sampling.allowed_token_ids
        if allowed:
            bits = _bits_allowed(frozenset(allowed), vocabulary)
            own |= dict.fromkeys(range(first, first + item.sampled_rows), bits)
        first += item.sampled_rows
    if not own:
        return masks
    known = masks.rows.tolist()
    rows = [*known, *sorted(own.keys() - set(known))]
    table = np.full((len(rows), mask_words(vocabulary)), _ALL, dtype=np.int32)
    if known:
        table[: len(known)] = masks.bits.numpy()
    for place, row in enumerate(rows):
        if row in own:
            table[place] &= own[row]
    empty = (row for place, row in enumerate(rows) if not table[place].any())
    errors = dict.fromkeys(empty, _NONE_ALLOWED) | masks.errors
    seconds = (masks.seconds or 0.0) + time.monotonic() - started
    return TokenMasks(torch.tensor(rows), torch.from_numpy(table), errors, seconds)


@lru_cache(_KEPT)
def _bits_allowed(allowed: frozenset[int], vocabulary: int) -> npt.NDArray[np.int32]:
    """int32 [words]: a mask of these tokens."""
    flags = np.zeros(mask_words(vocabulary) * WORD, dtype=np.uint8)
    flags[[token for token in allowed if 0 <= token < vocabulary]] = 1
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


def _bits_of(tokens: frozenset[int] | list[int]) -> npt.NDArray[np.int32]:
    """int32 [tokens]: each token's bit in its word."""
    return (np.uint32(1) << np.array([t % WORD for t in tokens], dtype=np.uint32)).view(np.int32)
