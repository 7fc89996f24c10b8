"""A demo task: a generator of examples and a score of answers. Knows nothing of models."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "held-out"]
_HELD_OUT_TENTHS = 2


@dataclass(frozen=True)
class TaskExample:
    """One request and the answer that the task expects."""

    prompt: str  # the user message
    completion: str
    fixture: str = ""  # further input of the scorer, e.g. a database script


class Task(Protocol):
    """A demo task. `examples` is a pure function of its arguments; the splits share no subject."""

    name: str
    description: str
    sample_prompt: str
    answer_tokens: int  # enough for any right answer, with room for a fence around it

    def examples(self, split: Split, count: int, seed: int) -> list[TaskExample]:
        """`count` distinct examples. Raises ValueError when the task can't make that many."""

    def score(self, examples: Sequence[TaskExample], answers: Sequence[str]) -> dict[str, float]:
        """Measures in 0..1 by name; the first is the one that matters most."""


def split_of(subject: str) -> Split:
    """The split to which a subject (a table, a product, a module) belongs, for good."""
    held_out = zlib.crc32(subject.encode()) % 10 < _HELD_OUT_TENTHS
    return "held-out" if held_out else "train"


def only(split: Split, subjects: Sequence[str]) -> list[str]:
    """Subjects of one split, in the given order."""
    return [subject for subject in subjects if split_of(subject) == split]


def unfenced(answer: str) -> str:
    """The content of the answer's first Markdown code block, or else the answer itself.

    Untrained chat models wrap code and JSON in fences, which alone should not count as wrong.
    """
    block = re.search(r"```[a-zA-Z]*\n(.*?)(```|\Z)", answer, re.DOTALL)
    return (block.group(1) if block else answer).strip()


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return sum(values) / len(values)
