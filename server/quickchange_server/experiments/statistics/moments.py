"""Count, sum and sum of squares of the units of each variant: all that the inference needs.

A *unit* is what an experiment assigns: a user where assignment is sticky, a request where it is
random. Outcomes of one unit are correlated, so each unit counts once, with the mean of its
outcomes. Knows nothing of where the sums come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["number", "flag"]  # a flag's units lie between 0 and 1; a label is a flag each


@dataclass(frozen=True)
class Moments:
    """Of V variants, the control first. Leading dimensions (of simulations) are free."""

    kind: Kind
    count: Floats  # [..., V] units that have an outcome
    total: Floats  # [..., V] sum over units
    squares: Floats  # [..., V] sum of squares over units

    @property
    def mean(self) -> Floats:
        """[..., V]; NaN where there is no unit."""
        return ratio(self.total, self.count)

    @property
    def variance(self) -> Floats:
        """[..., V] unbiased sample variance; NaN below two units."""
        spread = np.maximum(self.squares - self.total * np.nan_to_num(self.mean), 0.0)
        return ratio(spread, self.count - 1)

    @property
    def working_variance(self) -> Floats:
        """[..., V] what standard errors use.

        For flags, the variance with one unit of 0 and one of 1 added: a rare flag that one variant
        has not seen yet must not claim to be known exactly.
        """
        if self.kind == "number":
            return self.variance
        more = self.count + 2
        mean = (self.total + 1) / more
        return np.asarray(np.maximum((self.squares + 1) / more - mean**2, 0.0))


def pooled(strata: Sequence[Moments]) -> Moments:
    """All strata's units together. Raises ValueError without strata."""
    if not strata:
        raise ValueError("no strata to pool: give one or more")
    return Moments(
        strata[0].kind,
        np.sum([part.count for part in strata], axis=0),
        np.sum([part.total for part in strata], axis=0),
        np.sum([part.squares for part in strata], axis=0),
    )


def ratio(above: Floats, below: Floats) -> Floats:
    """`above / below`, NaN where `below` isn't positive."""
    filled = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.asarray(np.divide(above, below, out=filled, where=below > 0))
