"""llguidance, as both processes call it: tokenizers, grammars, and their compilation.

JSON is written in one way where it could be in many: up to 24 blanks between tokens, and in strings
the escapes that JSON needs and no others. Without the first a model may write blanks without end;
without the second `"\\u0061"` would be another way to write the key `"a"`, past what the schema
says of that key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import llguidance

from quickchange_server.constraints.errors import ConstraintError
from quickchange_server.messages import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

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
