"""Constrained sequences in the engine: grammars compiled beside decoding, masks for sampled rows.

A `ConstraintCompiler`, which knows the tokenizer, says which tokens may follow; here are token ids
alone. A sequence waits outside the scheduler until its grammar is compiled, so it holds up no
other; one that comes with output (after a restart) is taken there by replaying it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache
from torch import Tensor

from quickchange_kernels.sampling.token_mask import WORD, mask_words, token_mask_
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.engine.sequence import Sequence
from quickchange_server.model.input_buffers import upload
from quickchange_server.protocol import Constraint, Submit
from quickchange_server.structured_output.compiler import ConstraintCompiler, Masked, Matcher
from quickchange_server.structured_output.errors import ConstraintError

_KEPT = 64  # compiled grammars
_ALL = -1  # a word that allows all of its tokens
_NO_TOKEN = (
    "constraint: its text can only go on with tokens that end the output, and it is not complete; "
    "ask for other stop tokens"
)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The masks of a step's sampled rows that are constrained; maybe none."""

    rows: Tensor  # int64 [M], among the sampled rows
    bits: Tensor  # int32 [M, words]
    errors: dict[int, str]  # sampled row -> why its grammar can't go on
    seconds: float | None  # that making them took; None: there are none

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
    """Owner of the compile thread and of the compiled grammars."""

    def __init__(
        self, compiler: ConstraintCompiler, vocabulary: int, on_wake: Callable[[], None]
    ) -> None:
        """on_wake: called on the compile thread when a grammar is ready, or can't be."""
        self._compiler = compiler
        self._vocabulary = vocabulary
        self._on_wake = on_wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiled = LRUCache[Constraint, Matcher](_KEPT)  # at their beginnings
        self._waiting: dict[str, _Waiting] = {}

    def refusal(self, submit: Submit) -> str | None:
        """Why a request can't be served; any constraint may be asked for."""

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

    def masks(self, sampling: Seq[Scheduled]) -> TokenMasks:
        """The masks of items that sample, in their order."""
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
            return NO_MASKS
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
        matcher = compiled.copy()
        for token in output:
            matcher.advance(token)
        if matcher.error is not None:
            raise ConstraintError(matcher.error)
        return matcher


class NoConstraints:
    """An engine that has no tokenizer to constrain text with."""

    def refusal(self, submit: Submit) -> str | None:
        if submit.constraint is None:
            return None
        return "constraint: this engine has no tokenizer to constrain text with; remove it"

    def hold(self, sequence: Sequence, constraint: Constraint) -> None:
        raise RuntimeError(f"{sequence.request_id} is constrained: {constraint.kind}")

    def cancel(self, request_id: str) -> None:
        """No sequence waits here."""

    def released(self) -> list[tuple[Sequence, str | None]]:
        return []

    def __len__(self) -> int:
        return 0

    def masks(self, sampling: Seq[Scheduled]) -> TokenMasks:
        del sampling
        return NO_MASKS

    def close(self) -> None:
        """There is no thread to end."""


def constraints_of(
    compiler: ConstraintCompiler | None, vocabulary: int, on_wake: Callable[[], None]
) -> Constraints | NoConstraints:
    """The constrained sequences of an engine; compiler: None where text can't be constrained."""
    return NoConstraints() if compiler is None else Constraints(compiler, vocabulary, on_wake)


def _bits_of(tokens: frozenset[int] | list[int]) -> npt.NDArray[np.int32]:
    """Each token's bit in its word."""
    return (np.uint32(1) << np.array([t % WORD for t in tokens], dtype=np.uint32)).view(np.int32)
