"""Results of an experiment, in the form of the HTTP response. Every number is finite or null."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quickchange_server.experiments.statistics.best import Goal

Decision = Literal["keep collecting", "better", "worse", "no relevant difference"]
OutcomeKind = Literal["number", "flag", "label"]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class VariantResult:
    """Statistics of one variant's units that have the outcome."""

    variant: str
    count: int
    mean: float | None  # a flag's proportion, a label's share
    variance: float | None  # unbiased, over units; None below two
    interval: Interval | None  # for the mean, valid at all times, at the experiment's alpha
    probability_best: float | None  # a description, not the decision rule


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of a variant and the control."""

    variant: str
    control: str
    difference: float | None
    interval: Interval | None  # simultaneous over all comparisons of the outcome
    p_value: float | None  # always-valid, times the number of comparisons
    needed_units: int  # for the smaller of the two, before a decision
    enough: bool  # both have enough units, and for flags enough of both values
    decision: Decision


@dataclass(frozen=True, slots=True)
class OutcomeResult:
    """The result for one outcome, or for one label of a label outcome."""

    name: str
    kind: OutcomeKind
    label: str | None
    goal: Goal
    margin: float | None  # differences smaller than this don't matter
    comparisons_corrected: int  # divisor of the error rate
    variants: tuple[VariantResult, ...]  # the control first
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class RatioResult:
    """The test of the variants' shares of units against their weights."""

    observed: dict[str, int]
    expected: dict[str, float]
    p_value: float  # always-valid
    threshold: float
    mismatch: bool  # p_value below threshold: distrust every comparison


@dataclass(frozen=True, slots=True)
class Method:
    """The statistical methods, with their sources."""

    intervals: str
    proportions: str
    multiplicity: str
    ratio: str
    probability_best: str


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """The results for all outcomes of an experiment at one moment."""

    alpha: float
    minimum_events: int  # flags and labels: units of each value before a decision
    method: Method
    ratio: RatioResult
    outcomes: tuple[OutcomeResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: object) -> object:
    """The value with tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
