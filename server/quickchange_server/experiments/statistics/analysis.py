"""Analysis of an experiment's sums: means, differences, decisions, and a test of the shares.

Variants are identified by position, the control first. Each is compared with the control, and the
error rate is divided by the number of comparisons (Bonferroni): Holm's procedure would reject a
little more, but has no intervals that agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quickchange_server.experiments.statistics import sequential
from quickchange_server.experiments.statistics.best import Goal, probability_best
from quickchange_server.experiments.statistics.moments import Floats, Moments, pooled
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.experiments.statistics.ratio import Segment, sample_ratio
from quickchange_server.experiments.statistics.result_types import (
    Comparison,
    Decision,
    ExperimentResult,
    Interval,
    Method,
    OutcomeKind,
    OutcomeResult,
    RatioResult,
    VariantResult,
)

METHOD = Method(
    intervals="asymptotic confidence sequences (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas "
    "2024, arXiv 2103.06476), normal mixture tuned by Howard et al. 2021",
    proportions="beta-binomial mixture confidence sequences (Robbins 1970; Lindon and Malek "
    "2022, arXiv 2011.03567)",
    multiplicity="Bonferroni over the comparisons of one outcome",
    ratio="sequential multinomial test (Lindon and Malek 2022, arXiv 2011.03567)",
    probability_best="posterior with a flat prior, by numerical integration: a description, not "
    "the rule",
)


@dataclass(frozen=True, slots=True)
class Sums:
    """One variant's units with an outcome: count, sum and sum of squares of their values."""

    count: int
    total: float
    squares: float


@dataclass(frozen=True, slots=True)
class OutcomeSums:
    """The sums of a number, of a flag (0 to 1 for a unit), or of one label (1 if the unit has it).

    `sums` has a row for each stretch of constant weights, in any order, with the units first seen
    in it. `labels` is the number of labels that are tested; 1 for numbers and flags. `least` is
    what no unit's number can be below.
    """

    name: str
    kind: OutcomeKind
    sums: Sequence[Sequence[Sums]]  # [stretch][variant], the control first
    goal: Goal = "increase"
    margin: float | None = None
    label: str | None = None
    labels: int = 1
    least: float = -math.inf

    @property
    def means(self) -> Interval:
        """The means that a variant can have."""
        return (self.least, math.inf) if self.kind == "number" else (0.0, 1.0)

    @property
    def differences(self) -> Interval:
        """The differences that two variants can have."""
        return (-math.inf, math.inf) if self.kind == "number" else (-1.0, 1.0)


@dataclass(frozen=True, slots=True)
class StretchUnits:
    """Weights of a stretch, and the units of each variant first seen in it."""

    weights: Sequence[float]
    units: Sequence[int]


def analyse(
    variants: Sequence[str],
    outcomes: Sequence[OutcomeSums],
    stretches: Sequence[StretchUnits],
    plan: Plan,
) -> ExperimentResult:
    """The result of an experiment now.

    Raises ValueError for sums that don't match the variants or the kind.
    """
    if len(variants) < 2 or len(set(variants)) < len(variants):
        raise ValueError(f"variants {list(variants)}: give two or more, each once, control first")
    return ExperimentResult(
        alpha=plan.alpha,
        minimum_events=plan.minimum_events,
        method=METHOD,
        ratio=_ratio(variants, stretches, plan),
        outcomes=tuple(_outcome(variants, outcome, plan) for outcome in outcomes),
    )


def decide(
    interval: Interval, *, enough: bool, goal: Goal = "increase", margin: float | None = None
) -> Decision:
    """The decision that a difference's interval allows."""
    low, high = interval
    if not enough or math.isnan(low) or math.isnan(high):
        return "keep collecting"
    if margin is not None and -margin < low and high < margin:
        return "no relevant difference"
    if low <= 0 <= high:
        return "keep collecting"
    return "better" if (low > 0) == (goal == "increase") else "worse"


def _outcome(variants: Sequence[str], outcome: OutcomeSums, plan: Plan) -> OutcomeResult:
    strata = _strata(variants, outcome)
    moments = pooled(strata)
    corrected = (len(variants) - 1) * outcome.labels
    return OutcomeResult(
        name=outcome.name,
        kind=outcome.kind,
        label=outcome.label,
        goal=outcome.goal,
        margin=outcome.margin,
        comparisons_corrected=corrected,
        variants=_variants(variants, moments, outcome, plan),
        comparisons=_comparisons(variants, strata, outcome, corrected, plan),
    )


def _variants(
    names: Sequence[str], moments: Moments, outcome: OutcomeSums, plan: Plan
) -> tuple[VariantResult, ...]:
    best = probability_best(moments, outcome.goal)
    intervals = _mean_intervals(moments, outcome, plan)
    return tuple(
        VariantResult(
            variant=name,
            count=int(moments.count[k]),
            mean=_finite(moments.mean[k]),
            variance=_finite(moments.variance[k]),
            interval=intervals[k],
            probability_best=_finite(best[k]),
        )
        for k, name in enumerate(names)
    )


def _mean_intervals(moments: Moments, outcome: OutcomeSums, plan: Plan) -> list[Interval | None]:
    if moments.kind == "flag":
        pairs = zip(moments.total, moments.count, strict=True)
        return [sequential.proportion_interval(float(s), float(n), plan.alpha) for s, n in pairs]
    return _around(sequential.means(moments), plan.alpha, plan.rho, outcome.means)


def _comparisons(
    names: Sequence[str],
    strata: Sequence[Moments],
    outcome: OutcomeSums,
    corrected: int,
    plan: Plan,
) -> tuple[Comparison, ...]:
    estimate = sequential.differences(strata)
    intervals = _around(estimate, plan.alpha / corrected, plan.rho, outcome.differences)
    p_values = np.minimum(sequential.p_value(estimate, plan.rho) * corrected, 1.0)
    moments = pooled(strata)
    enough, needed = plan.enough(moments), plan.needed(moments)
    return tuple(
        Comparison(
            variant=name,
            control=names[0],
            difference=_finite(estimate.value[k]),
            interval=intervals[k],
            p_value=_finite(p_values[k]),
            needed_units=int(needed[k]),
            enough=bool(enough[k]),
            decision=decide(
                intervals[k] or (math.nan, math.nan),
                enough=bool(enough[k]),
                goal=outcome.goal,
                margin=outcome.margin,
            ),
        )
        for k, name in enumerate(names[1:])
    )


def _around(
    estimate: sequential.Estimate, alpha: float, rho: float, possible: Interval
) -> list[Interval | None]:
    """The intervals, less what is not possible: what they hold of that is not lost by it."""
    half = sequential.half_width(estimate, alpha, rho)
    ends = zip(estimate.value - half, estimate.value + half, strict=True)
    return [
        (float(max(low, possible[0])), float(min(high, possible[1])))
        if np.isfinite(low + high)
        else None
        for low, high in ends
    ]


def _ratio(names: Sequence[str], stretches: Sequence[StretchUnits], plan: Plan) -> RatioResult:
    for stretch in stretches:
        if not len(stretch.weights) == len(stretch.units) == len(names):
            raise ValueError(
                f"a stretch has {len(stretch.weights)} weights and {len(stretch.units)} counts: "
                f"give {len(names)} of each, one a variant"
            )
    found = sample_ratio(
        (Segment(_floats(part.weights), _floats(part.units)) for part in stretches), len(names)
    )
    return RatioResult(
        observed={name: int(found.observed[k]) for k, name in enumerate(names)},
        expected={name: float(found.expected[k]) for k, name in enumerate(names)},
        p_value=found.p_value,
        threshold=plan.ratio_threshold,
        mismatch=found.p_value < plan.ratio_threshold,
    )


def _strata(names: Sequence[str], outcome: OutcomeSums) -> list[Moments]:
    """The moments of each stretch. Raises ValueError for impossible sums."""
    if not outcome.sums:
        raise ValueError(f"outcome {outcome.name!r} has no sums: give a row, of zeros if need be")
    return [_moments(names, outcome, row) for row in outcome.sums]


def _moments(names: Sequence[str], outcome: OutcomeSums, row: Sequence[Sums]) -> Moments:
    if len(row) != len(names):
        raise ValueError(
            f"outcome {outcome.name!r} has sums of {len(row)} variants: give {len(names)}"
        )
    for name, sums in zip(names, row, strict=True):
        if not _possible(outcome.kind, sums):
            raise ValueError(
                f"outcome {outcome.name!r} of variant {name!r}: no {outcome.kind} units have "
                f"count {sums.count}, sum {sums.total} and sum of squares {sums.squares}"
            )
    return Moments(
        "number" if outcome.kind == "number" else "flag",
        _floats([sums.count for sums in row]),
        _floats([sums.total for sums in row]),
        _floats([sums.squares for sums in row]),
    )


def _possible(kind: OutcomeKind, sums: Sums) -> bool:
    if sums.count < 0 or sums.squares < 0 or not math.isfinite(sums.total + sums.squares):
        return False
    # Sums of many floats are compared up to rounding.
    slack = 1e-9 * (1 + sums.count)
    return kind == "number" or (
        -slack <= sums.total <= sums.count + slack and sums.squares <= sums.total + slack
    )


def _floats(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
