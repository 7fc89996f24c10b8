"""Grammars by llguidance, in both processes: compilation, and masks over the model's token ids.

JSON is constrained beyond its grammar: at most 24 blanks between tokens, and in strings only the
escapes that JSON requires. Otherwise a model could write blanks without end, and `"\u0061"` would
spell the key `"a"` in a way that escapes the schema's rules for that key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import numpy.typing as npt

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.compiler import Masked, Matcher
from quickchange_server.structured_output.errors import NO_TOKENIZER, ConstraintError
from quickchange_server.structured_output.schema_keywords import enforceable
from quickchange_server.structured_output.validator import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_BLANKS = r"[\x20\x0A\x0D\x09]{1,24}"
_ESCAPES = '"\\bfnrt'
JSON_FORM: JsonCompileOptions = {"whitespace_pattern": _BLANKS, "json_allowed_escapes": _ESCAPES}

_TERSE = "<non-verbose/>"  # suffix of the library's messages that leave out its state
_EMPTY = "NoExtension"  # prefix of the message for a grammar that no text matches
# Items of the parser at one place in the text. An optional property takes four, so that the largest
# schema that is accepted (schema_keywords.py) stays below, wherever its text has come to.
_MOST_ITEMS = 20_000
_MOST_THREADS = 4  # for the masks of a step

Tokens = llguidance.LLTokenizer


def read_tokenizer(tokenizer: str, vocabulary: int, ends: Iterable[int], spare: int = 0) -> Tokens:
    """Read a tokenizer for the library.

    tokenizer: JSON of the `tokenizers` library. vocabulary: the model's rows; tokens past them are
    left out, and ids past the tokenizer's are never allowed. ends: the model's end-of-sequence ids.
    spare: further rows, of tokens that are never allowed.

    Raises ConstraintError if the library can't read it or there is no end-of-sequence id.
    """
    if not (known := sorted(ends)):
        raise ConstraintError("the model has no end-of-sequence token")
    with _panics_raised("the model's tokenizer can't be read"):
        within = _within(tokenizer, vocabulary)
        return llguidance.LLTokenizer(within, n_vocab=vocabulary + spare, eos_token=known)


def _within(tokenizer: str, vocabulary: int) -> str:
    """The tokenizer's JSON without tokens that the model has no row for (Gemma 3's image token)."""
    tree = json.loads(tokenizer)
    model, added = tree["model"], tree["added_tokens"]
    pieces = model["vocab"]
    ids = pieces.values() if isinstance(pieces, dict) else range(len(pieces))
    if max([*ids, *(token["id"] for token in added)], default=0) < vocabulary:
        return tokenizer
    tree["added_tokens"] = [token for token in added if token["id"] < vocabulary]
    if isinstance(pieces, dict):
        kept = {piece: id_ for piece, id_ in pieces.items() if id_ < vocabulary}
        model["vocab"] = kept
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if _merges(merge) <= kept.keys()]
    else:
        model["vocab"] = pieces[:vocabulary]
    return json.dumps(tree)


def _merges(merge: str | list[str]) -> set[str]:
    """Pieces of a BPE merge: both sides and what they make."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def compiled(tokens: Tokens, constraint: Constraint) -> llguidance.LLMatcher:
    """A matcher at the start of the constraint's grammar.

    Its first mask is computed, which builds the library's lazy parts. Raises ConstraintError with
    the library's message.
    """
    with _panics_raised("can't be compiled"):
        limits = llguidance.LLParserLimits(
            max_items_in_row=_MOST_ITEMS, step_max_items=20 * _MOST_ITEMS, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(tokens, _grammar(constraint), log_level=0, limits=limits)
        if not matcher.is_error() and not matcher.is_stopped():
            matcher.compute_bitmask()
    if matcher.is_error():
        error = matcher.get_error().removesuffix(_TERSE).rstrip()
        raise ConstraintError("no text satisfies it" if error.startswith(_EMPTY) else error)
    return matcher


@contextmanager
def _panics_raised(what: str) -> Iterator[None]:
    """Raise the library's errors, and its panics, which are no Exception, as ConstraintError."""
    try:
        yield
    except ConstraintError:
        raise
    except Exception as error:
        raise ConstraintError(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConstraintError(f"{what}: {error}") from error


def _grammar(constraint: Constraint) -> str:
    answer = _answer_grammar(constraint)
    if not constraint.before:
        return answer
    read = json.loads(answer)["grammars"] if answer.startswith("{") else [{"lark_grammar": answer}]
    (only,) = read
    return json.dumps(
        {"grammars": [{"lark_grammar": constraint.before}, {**only, "name": "answer"}]}
    )


def _answer_grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(constraint.source)
        case "grammar":
            return llguidance.LLMatcher.grammar_from_lark(constraint.source)
        case "json_object":
            return _schema_grammar('{"type": "object"}')
        case "json_schema":
            return _schema_grammar(constraint.source)


def _schema_grammar(source: str) -> str:
    schema = enforceable(json.loads(source))
    whole = {} if schema is True else schema  # the library takes objects alone
    return llguidance.LLMatcher.grammar_from_json_schema(whole, overrides=JSON_FORM)


class TokenGrammars:
    """`ConstraintCompiler` for one tokenizer. `compile` and `fill` may run at the same time."""

    def __init__(
        self, tokenizer: str, vocabulary: int, ends: frozenset[int], spare: int = 0
    ) -> None:
        """Arguments and errors are those of `read_tokenizer`."""
        self.ends = ends
        self._tokens = read_tokenizer(tokenizer, vocabulary, ends, spare)
        self._executor = llguidance.LLExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    @classmethod
    def of(cls, text: Vocabulary, spare: int = 0) -> TokenGrammars:
        """Make it for a model's tokenizer. Raises ConstraintError if the library can't read it.

        spare: tokens behind the base's own.
        """
        tokenizer = text.tokenizer_json()
        if tokenizer is None:
            raise ConstraintError(NO_TOKENIZER)
        return cls(tokenizer, text.vocab_size, text.eos_ids, spare)

    def compile(self, constraint: Constraint) -> LibraryMatcher:
        """Compile a constraint. Raises ConstraintError."""
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
    """`Matcher` by llguidance."""

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
