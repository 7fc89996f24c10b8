"""What an experiment came to, in the shape that HTTP shows and the page draws.

Every number is finite or null.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quickchange_server.experiments.statistics.best import Goal

Decision = Literal["keep collecting", "better", "worse", "no relevant difference"]
OutcomeKind = Literal["number", "flag", "label"]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One variant's units that have the outcome."""

    variant: str
    count: int
    mean: float | None  # of a flag: the proportion; of a label: its share
    variance: float | None  # of units, unbiased; None below two
    interval: Interval | None  # of the mean, at all times, at the experiment's alpha
    probability_best: float | None  # a description, not the rule


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant less the control."""

    variant: str
    control: str
    difference: float | None
    interval: Interval | None  # holds for all comparisons of the outcome together
    p_value: float | None  # always-valid, times the number of comparisons
    needed_units: int  # of the smaller of the two, before a decision
    enough: bool  # they are there, and of a flag enough of both values
    decision: Decision


@dataclass(frozen=True, slots=True)
class OutcomeResult:
    """One outcome; of a label outcome, one of its labels."""

    name: str
    kind: OutcomeKind
    label: str | None
    goal: Goal
    margin: float | None  # differences smaller than this don't matter
    comparisons_corrected: int  # by how many the error rate was divided
    variants: tuple[VariantResult, ...]  # the control first
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class RatioResult:
    """Whether the variants got the shares that their weights promise."""

    observed: dict[str, int]
    expected: dict[str, float]
    p_value: float  # always-valid
    threshold: float
    mismatch: bool  # p_value below threshold: distrust every comparison


@dataclass(frozen=True, slots=True)
class Method:
    """How it was computed, with its source."""

    intervals: str
    proportions: str
    multiplicity: str
    ratio: str
    probability_best: str


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """All outcomes of an experiment at one moment."""

    alpha: float
    minimum_events: int  # flags and labels: units of each value before a decision
    method: Method
    ratio: RatioResult
    outcomes: tuple[OutcomeResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: object) -> object:
    """Tuples as lists: what JSON would give back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
