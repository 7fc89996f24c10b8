"""Grammars over the engine's tokenizer: `engine.constraints.ConstraintCompiler` by llguidance."""

from __future__ import annotations

import os
from collections.abc import Sequence

import llguidance
import numpy as np
import numpy.typing as npt

from quickchange_server.constraints.errors import NO_TOKENIZER, ConstraintError
from quickchange_server.constraints.library import compiled, read_tokenizer
from quickchange_server.engine.constraints import Masked
from quickchange_server.engine.sequence import Matcher
from quickchange_server.messages import Constraint
from quickchange_server.text import Text

_MOST_THREADS = 4  # for a step's masks


class TokenGrammars:
    """What a tokenizer's tokens may be under constraints. `compile` may run beside `fill`."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: frozenset[int]) -> None:
        """As `read_tokenizer`, and raises as that does."""
        self.ends = ends
        self._tokens = read_tokenizer(tokenizer, vocabulary, ends)
        self._executor = llguidance.LLExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    @classmethod
    def of(cls, text: Text) -> TokenGrammars:
        """Raises ConstraintError where a model's tokenizer is of no kind that the library reads."""
        tokenizer = text.tokenizer_json()
        if tokenizer is None:
            raise ConstraintError(NO_TOKENIZER)
        return cls(tokenizer, text.vocab_size, text.eos_ids)

    def compile(self, constraint: Constraint) -> LibraryMatcher:
        """Raises ConstraintError."""
        return LibraryMatcher(compiled(self._tokens, constraint), self.ends)

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        """See `engine.constraints.ConstraintCompiler`."""
        into = (bits.ctypes.data, bits.strides[0], bits.shape[0])
        single = [(_library(one.matcher).inner, one.row) for one in wanted if not one.drafts]
        chains = [
            (_library(one.matcher).inner, one.row, list(one.drafts)) for one in wanted if one.drafts
        ]
        if single:
            self._executor.unsafe_compute_mask_ptr(single, *into)
        if chains:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(chains, *into)


class LibraryMatcher:
    """A grammar, and how far a text has come in it."""

    def __init__(self, inner: llguidance.LLMatcher, ends: frozenset[int]) -> None:
        self.inner = inner
        self._ends = ends

    @property
    def error(self) -> str | None:
        return self.inner.get_error() if self.inner.is_error() else None

    @property
    def complete(self) -> bool:
        return self.inner.is_stopped() and not self.inner.is_error()

    def copy(self) -> LibraryMatcher:
        return LibraryMatcher(self.inner.deep_copy(), self._ends)

    def advance(self, token: int) -> None:
        self.inner.consume_token(token)

    def forced(self) -> list[int]:
        return self.inner.compute_ff_tokens()

    def allowed(self, tokens: Sequence[int]) -> int:
        count = self.inner.validate_tokens(list(tokens))
        ends = (place for place, token in enumerate(tokens[:count], 1) if token in self._ends)
        return next(ends, count)


def _library(matcher: Matcher) -> LibraryMatcher:
    if not isinstance(matcher, LibraryMatcher):
        raise TypeError(f"{type(matcher).__name__} was not made by this compiler")
    return matcher
