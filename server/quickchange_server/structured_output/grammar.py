"""llguidance, as both processes call it: tokenizers, grammars, and their compilation.

JSON is written in one way where it could be in many: up to 24 blanks between tokens, and in strings
the escapes that JSON needs and no others. Without the first a model may write blanks without end;
without the second `"\u0061"` would be another way to write the key `"a"`, past what the schema
says of that key.

Grammars over the engine's tokenizer: `ConstraintCompiler` by llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import llguidance

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.errors import ConstraintError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quickchange_server.structured_output.compiler import Masked, Matcher
from quickchange_server.structured_output.errors import NO_TOKENIZER
from quickchange_server.structured_output.validator import Vocabulary

_BLANKS = r"[\x20\x0A\x0D\x09]{1,24}"
_ESCAPES = '"\\bfnrt'
JSON_FORM: JsonCompileOptions = {"whitespace_pattern": _BLANKS, "json_allowed_escapes": _ESCAPES}

_TERSE = "<non-verbose/>"  # ends the library's messages where its state is left out
_EMPTY = "NoExtension"

Tokens = llguidance.LLTokenizer


def read_tokenizer(tokenizer: str, vocabulary: int, ends: Iterable[int]) -> Tokens:
    """tokenizer: as the `tokenizers` library writes it in JSON. vocabulary: the model's, at least
    the tokenizer's: ids past that are never allowed. ends: the model's end-of-sequence ids.

    Raises ConstraintError where the library can't read it.
    """
    if not (known := sorted(ends)):
        raise ConstraintError("the model has no end-of-sequence token")
    with _panics_raised("the model's tokenizer can't be read"):
        return llguidance.LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=known)


def compiled(tokens: Tokens, constraint: Constraint) -> llguidance.LLMatcher:
    """The grammar at its beginning, with its first mask made, which builds what is built lazily.

    Raises ConstraintError: what is wrong with it, in the library's words.
    """
    with _panics_raised("can't be compiled"):
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(tokens, _grammar(constraint), log_level=0, limits=limits)
        if not matcher.is_error() and not matcher.is_stopped():
            matcher.compute_bitmask()
    if matcher.is_error():
        error = matcher.get_error().removesuffix(_TERSE).rstrip()
        raise ConstraintError("no text satisfies it" if error.startswith(_EMPTY) else error)
    return matcher


@contextmanager
def _panics_raised(what: str) -> Iterator[None]:
    """The library's errors, and its panics, which are no Exception, as ConstraintError."""
    try:
        yield
    except Exception as error:
        raise ConstraintError(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConstraintError(f"{what}: {error}") from error


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(constraint.source)
        case "grammar":
            return llguidance.LLMatcher.grammar_from_lark(constraint.source)
        case "json_object":
            return _of_schema('{"type": "object"}')
        case "json_schema":
            return _of_schema(constraint.source)


def _of_schema(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.loads(schema),
        overrides=JSON_FORM,
    )


_MOST_THREADS = 4  # for a step's masks


class TokenGrammars:
    """What a tokenizer's tokens may be under constraints. `compile` may run beside `fill`."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: frozenset[int]) -> None:
        """As `read_tokenizer`, and raises as that does."""
        self.ends = ends
        self._tokens = read_tokenizer(tokenizer, vocabulary, ends)
        self._executor = llguidance.LLExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    @classmethod
    def of(cls, text: Vocabulary) -> TokenGrammars:
        """Raises ConstraintError where a model's tokenizer is of no kind that the library reads."""
        tokenizer = text.tokenizer_json()
        if tokenizer is None:
            raise ConstraintError(NO_TOKENIZER)
        return cls(tokenizer, text.vocab_size, text.eos_ids)

    def compile(self, constraint: Constraint) -> LibraryMatcher:
        """Raises ConstraintError."""
        return LibraryMatcher(compiled(self._tokens, constraint), self.ends)

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        """See `ConstraintCompiler`."""
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
