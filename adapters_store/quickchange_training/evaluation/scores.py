"""Scores of answers against their references: exact match, JSON validity, token F1.

Text in, numbers from 0 to 1 out. Knows nothing of models or of speed.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over all examples."""

    exact_match: float
    json_valid: float | None  # over answers whose reference is JSON; None: no reference is
    token_f1: float


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Means of the three measures. Raises ValueError for no answers or unequal numbers."""
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    pairs = list(zip(answers, references, strict=True))
    asked_for_json = [is_json(answer) for answer, reference in pairs if is_json(reference)]
    return Scores(
        exact_match=_mean([exact_match(*pair) for pair in pairs]),
        json_valid=_mean(asked_for_json) if asked_for_json else None,
        token_f1=_mean([token_f1(*pair) for pair in pairs]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def exact_match(answer: str, reference: str) -> bool:
    """True if both are the same text, apart from white space around them."""
    return answer.strip() == reference.strip()


def is_json(text: str) -> bool:
    """True if `text` is one JSON object or array by RFC 8259 (no NaN).

    Bare numbers and words such as `true` do not count: as answers they are rarely meant as JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def token_f1(answer: str, reference: str) -> float:
    """F1 of the two bags of words, by SQuAD's scorer (Rajpurkar and others, 2016).

    Words are lower-cased and split at white space, without punctuation and English articles. Two
    texts without a word are equal.
    """
    given, expected = _words(answer), _words(reference)
    if not given or not expected:
        return float(given == expected)
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
