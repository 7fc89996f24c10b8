"""Parameters of an analysis that are fixed from the start: error rate, minimum sample, mixing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quickchange_server.experiments.statistics.moments import Floats, Moments
from quickchange_server.experiments.statistics.sequential import best_mixing


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters set before the first outcome: the error guarantee holds for a plan, not for a
    choice made after a look. The minimums' defaults come from `quickchange bench experiments`."""

    alpha: float = 0.05
    minimum_units: int = 100  # in each of two variants of equal size …
    minimum_units_uneven: int = 1500  # … rising to this for the smaller as the other outgrows it
    minimum_events: int = 20  # flags: units of each value, in two variants together
    sharpest_at: float = 1000.0  # units of a variant at which the interval is narrowest
    ratio_threshold: float = 0.01

    def __post_init__(self) -> None:
        _between("alpha", self.alpha, 0.0, 0.5)
        _between("ratio_threshold", self.ratio_threshold, 0.0, 0.5)
        if self.minimum_units < 2 or self.minimum_events < 0:
            raise ValueError(
                f"minimum_units {self.minimum_units} and minimum_events {self.minimum_events}: "
                "give at least 2 and 0"
            )
        if self.minimum_units_uneven < self.minimum_units:
            raise ValueError(
                f"minimum_units_uneven {self.minimum_units_uneven}: give at least minimum_units, "
                f"{self.minimum_units}"
            )
        if not self.sharpest_at > 0:
            raise ValueError(f"sharpest_at {self.sharpest_at}: give a number of units above 0")

    @property
    def rho(self) -> float:
        """The mixing parameter of all confidence sequences. It depends on the uncorrected `alpha`,
        so that adding a variant does not change it."""
        return best_mixing(self.sharpest_at, self.alpha)

    def needed(self, moments: Moments) -> Floats:
        """Units that the smaller of each variant and the control needs. [..., V - 1]

        Uneven sizes need more because of skewed outcomes: the skew of two means cancels in the
        difference of equal variants, but not if one is small, and its mean is far from normal for
        longer.
        """
        smaller, larger = _smaller(moments.count), _larger(moments.count)
        uneven = 1 - smaller / np.maximum(larger, 1)
        more = self.minimum_units_uneven - self.minimum_units
        return np.asarray(np.ceil(self.minimum_units + more * uneven))

    def enough(self, moments: Moments) -> NDArray[np.bool_]:
        """True if a variant and the control may be compared. [..., V - 1]"""
        units = _smaller(moments.count) >= self.needed(moments)
        if moments.kind == "number":
            return np.asarray(units)
        ones = moments.total[..., :1] + moments.total[..., 1:]
        both = moments.count[..., :1] + moments.count[..., 1:]
        return np.asarray(units & (np.minimum(ones, both - ones) >= self.minimum_events))


def _smaller(count: Floats) -> Floats:
    """The smaller count of each variant and the control. [..., V - 1]"""
    return np.asarray(np.minimum(count[..., :1], count[..., 1:]))


def _larger(count: Floats) -> Floats:
    return np.asarray(np.maximum(count[..., :1], count[..., 1:]))


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"{name} {value}: give a number above {low} and below {high}")
