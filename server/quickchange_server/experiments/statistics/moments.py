"""Count, sum and sum of squares of each variant's units: the sufficient statistics.

A *unit* is what an experiment assigns: a user if the assignment is sticky, otherwise a request.
Outcomes of one unit are correlated, so each unit counts once, with the mean of its outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["number", "flag"]  # a flag's units lie between 0 and 1; each label is a flag


@dataclass(frozen=True)
class Moments:
    """Moments of V variants, the control first. Leading dimensions (of simulations) are free."""

    kind: Kind
    count: Floats  # [..., V] units that have an outcome
    total: Floats  # [..., V] sum over units
    squares: Floats  # [..., V] sum of squares over units

    @property
    def mean(self) -> Floats:
        """Sample mean, [..., V]; NaN without units."""
        return ratio(self.total, self.count)

    @property
    def variance(self) -> Floats:
        """Unbiased sample variance, [..., V]; NaN below two units."""
        spread = np.maximum(self.squares - self.total * np.nan_to_num(self.mean), 0.0)
        return ratio(spread, self.count - 1)

    @property
    def working_variance(self) -> Floats:
        """Variance for standard errors, [..., V].

        Flags get one more unit of 0 and one of 1, so that a rare flag not yet seen in a variant
        does not have a standard error of zero.
        """
        if self.kind == "number":
            return self.variance
        more = self.count + 2
        mean = (self.total + 1) / more
        return np.asarray(np.maximum((self.squares + 1) / more - mean**2, 0.0))


def pooled(strata: Sequence[Moments]) -> Moments:
    """The moments of all strata together. Raises ValueError without strata."""
    if not strata:
        raise ValueError("no strata to pool: give one or more")
    return Moments(
        strata[0].kind,
        np.sum([part.count for part in strata], axis=0),
        np.sum([part.total for part in strata], axis=0),
        np.sum([part.squares for part in strata], axis=0),
    )


def ratio(above: Floats, below: Floats) -> Floats:
    """`above / below`; NaN unless `below` is positive."""
    filled = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.asarray(np.divide(above, below, out=filled, where=below > 0))
