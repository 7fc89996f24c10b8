"""Constrained sequences in the engine: grammars compiled beside decoding, masks for sampled rows.

Which tokens may follow is told by a `ConstraintCompiler`, which knows the tokenizer; here are token
ids alone. A sequence waits outside the scheduler until its grammar is compiled, so it holds up no
other; one that comes with output (after a restart) is taken there by replaying it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.sampling.token_mask import WORD, mask_words
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.engine.sequence import Matcher, Sequence
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.errors import ConstraintError

_KEPT = 64  # compiled grammars
_ALL = -1  # a word that allows all of its tokens
_NO_TOKEN = (
    "constraint: its text can only go on with tokens that end the output, and it is not complete; "
    "ask for other stop tokens"
)

M = TypeVar("M", bound=Matcher)


@dataclass(frozen=True, slots=True)
class Masked(Generic[M]):
    """The masks that one sequence needs: of its next token, and behind each of its drafts."""

    matcher: M
    row: int  # of the first mask; the others follow
    drafts: tuple[int, ...]


class ConstraintCompiler(Protocol):
    """What the engine needs of a library for grammars."""

    ends: frozenset[int]  # the model's end-of-sequence ids

    def compile(self, constraint: Constraint) -> Matcher:
        """On the compile thread. Raises ConstraintError."""
        ...

    def fill(self, wanted: Seq[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        """Write the masks [rows, words], as token_mask.py has them. The end ids are allowed where
        the grammar accepts. Behind a draft that the grammar forbids, or that ends it, rows stay as
        they are: they are never read. Matchers stay where they are."""
        ...


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Of a step's sampled rows, those that are constrained."""

    rows: Tensor  # int64 [M], among the sampled rows
    bits: Tensor  # int32 [M, words]
    errors: dict[int, str]  # sampled row -> why its grammar can't go on
    seconds: float  # that making them took


@dataclass(frozen=True, slots=True)
class _Waiting:
    sequence: Sequence
    matcher: Future[Matcher]


class Constraints:
    """Owner of the compile thread and of the compiled grammars."""

    def __init__(
        self, compiler: ConstraintCompiler, vocabulary: int, on_wake: Callable[[], None]
    ) -> None:
        """on_wake: called on the compile thread when a grammar is ready, or can't be."""
        self._compiler = compiler
        self._vocabulary = vocabulary
        self._on_wake = on_wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()  # at their beginnings
        self._waiting: dict[str, _Waiting] = {}

    def hold(self, sequence: Sequence, constraint: Constraint) -> None:
        """Keep a sequence until its grammar is compiled; `released` then has it."""
        made = self._thread.submit(self._make, constraint, tuple(sequence.output))
        self._waiting[sequence.request_id] = _Waiting(sequence, made)
        made.add_done_callback(lambda _: self._on_wake())

    def cancel(self, request_id: str) -> None:
        """Forget a sequence; its grammar is not compiled where that has not begun."""
        if (waiting := self._waiting.pop(request_id, None)) is not None:
            waiting.matcher.cancel()

    def released(self) -> list[tuple[Sequence, str | None]]:
        """Remove and return those whose grammar is ready, or can't be: with the error."""
        done = [one for one in self._waiting.values() if one.matcher.done()]
        released: list[tuple[Sequence, str | None]] = []
        for one in done:
            del self._waiting[one.sequence.request_id]
            error = one.matcher.exception()
            if error is None:
                one.sequence.matcher = one.matcher.result()
            elif not isinstance(error, ConstraintError):
                raise error
            released.append((one.sequence, None if error is None else str(error)))
        return released

    def __len__(self) -> int:
        return len(self._waiting)

    def masks(self, sampling: Seq[Scheduled]) -> TokenMasks | None:
        """For items that sample, in their order; None where none is constrained."""
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
                stops.append(frozenset(item.sequence.sampling.stop_token_ids))
                rows += range(first, first + item.sampled_rows)
            first += item.sampled_rows
        if not wanted:
            return None
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
        return TokenMasks(torch.tensor(rows), torch.from_numpy(bits), errors, seconds)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _allow_stops(self, bits: npt.NDArray[np.int32], stops: frozenset[int]) -> None:
        """What ends a sequence may follow exactly where its text is one that the grammar allows."""
        ends = self._compiler.ends
        accepts = (bits[:, [end // WORD for end in ends]] & _bits_of(ends)).any(axis=1)
        for token in ends | stops:
            word, bit = token // WORD, _bits_of([token])
            lawful = accepts if token in stops else np.zeros_like(accepts)
            bits[:, word] = np.where(lawful, bits[:, word] | bit, bits[:, word] & ~bit)

    def _make(self, constraint: Constraint, output: tuple[int, ...]) -> Matcher:
        """On the compile thread, which alone touches what is compiled."""
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compiled[constraint] = self._compiler.compile(constraint)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        matcher = compiled.copy()
        for token in output:
            matcher.advance(token)
        if matcher.error is not None:
            raise ConstraintError(matcher.error)
        return matcher


def _bits_of(tokens: frozenset[int] | list[int]) -> npt.NDArray[np.int32]:
    """Each token's bit in its word."""
    return (np.uint32(1) << np.array([t % WORD for t in tokens], dtype=np.uint32)).view(np.int32)
