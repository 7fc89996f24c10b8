"""What an evaluation found, as plain frozen data: the JSON that is written is these fields.

Times in seconds, losses in nats a token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from quickchange_training.evaluation.scores import Scores

VERSION = 1


@dataclass(frozen=True, slots=True)
class EvaluationSpeed:
    """One pass over some of the examples, so many at a time."""

    concurrency: int
    requests: int
    tokens_per_second: float  # new tokens of all requests over the wall-clock time
    tokens_per_step: float  # new tokens a request gets in a step that gives it any: 1 undrafted
    first_token_seconds: float  # median


@dataclass(frozen=True, slots=True)
class DepthAcceptance:
    """Drafts at one depth (from 1: tokens after the one that was certain), over all passes."""

    depth: int
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """What was answered to one example."""

    origin: str  # FILE line N
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter, or one way of drafting for it."""

    label: str
    scores: Scores
    loss: float  # nats a token of the references, end-of-sequence included, teacher forced
    speeds: tuple[EvaluationSpeed, ...]
    acceptance: tuple[DepthAcceptance, ...]  # empty: nothing was drafted
    answers: tuple[ScoredAnswer, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rows, and what they were measured on."""

    task: str  # the file's name
    model: str
    examples: int
    max_tokens: int
    rows: tuple[Row, ...]
    version: int = VERSION


def save(evaluation: Evaluation, path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    part.replace(path)
