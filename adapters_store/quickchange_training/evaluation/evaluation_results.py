"""Results of an evaluation as plain frozen data, written as JSON of the same fields.

Times in seconds, losses in nats per token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from quickchange_training.evaluation.scores import Scores

VERSION = 2


@dataclass(frozen=True, slots=True)
class EvaluationSpeed:
    """Speed of one pass over some of the examples at one concurrency."""

    concurrency: int
    requests: int
    tokens_per_second: float  # new tokens of all requests over the wall-clock time
    tokens_per_step: float  # new tokens of a request in a step that gives it any: 1 undrafted
    first_token_seconds: float  # median


@dataclass(frozen=True, slots=True)
class DepthAcceptance:
    """Drafts at one depth (from 1: tokens after the certain one), over all passes."""

    depth: int
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """The answer to one example."""

    origin: str  # FILE line N
    text: str


@dataclass(frozen=True, slots=True)
class EvaluatedSize:
    """Size of what answers, without the base; of several adapters at once, their sum."""

    parameters: int  # values stored
    stored_bytes: int  # the file of a version in a store
    device_bytes: int  # memory that it takes where the engine runs


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter, one way of drafting for it, or several adapters at once."""

    label: str
    size: EvaluatedSize
    scores: Scores
    loss: float  # nats per reference token, end-of-sequence included, teacher forced
    speeds: tuple[EvaluationSpeed, ...]
    acceptance: tuple[DepthAcceptance, ...]  # empty: nothing was drafted
    answers: tuple[ScoredAnswer, ...]


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """One pass in which the variants take turns, so that they share the engine's steps."""

    speed: EvaluationSpeed
    same_answers: int  # requests answered as when their variant ran alone


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rows of all variants, with the task and model they were measured on."""

    task: str  # the file's name
    model: str
    examples: int
    max_tokens: int
    rows: tuple[Row, ...]
    mixed: MixedBatch | None = None  # None: not yet measured
    version: int = VERSION


def save(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    part.replace(path)
