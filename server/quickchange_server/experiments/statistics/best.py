"""Probability that each variant is the best: a description, never the decision rule.

The posterior has a flat prior: Beta(1 + total, 1 + count - total) for flags, the normal
approximation for numbers. It is integrated numerically, so the same data give the same digits.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from quickchange_server.experiments.statistics.moments import Floats, Moments

Goal = Literal["increase", "decrease"]


def probability_best(moments: Moments, goal: Goal) -> Floats:
    """The probability for each variant, [V]; all NaN if one has too few units for a posterior."""
    from scipy import special  # 40 MiB that a server needs once results are asked for

    variance = moments.working_variance
    if np.any(moments.count < 2) or not np.all(variance > 0):
        return np.full(moments.count.shape, np.nan)
    # The quantiles of every posterior, so that a narrow one beside a wide one is resolved too.
    if moments.kind == "flag":
        a, b = 1 + moments.total, 1 + moments.count - moments.total
        points = np.unique(special.betaincinv(a, b, _nodes()[:, None]))
        below = special.betainc(a, b, points[:, None])  # [points, V]
    else:
        scale = np.sqrt(variance / moments.count)
        points = np.unique(moments.mean + scale * special.ndtri(_nodes()[:, None]))
        below = special.ndtr((points[:, None] - moments.mean) / scale)
    beats = below if goal == "increase" else 1 - below
    won = [
        np.trapezoid(np.prod(np.delete(beats, k, axis=1), axis=1), below[:, k])
        for k in range(below.shape[1])
    ]
    return np.asarray(np.array(won) / np.sum(won))


@cache
def _nodes() -> Floats:
    """Quantiles of each posterior."""
    from scipy.special import ndtr

    return np.asarray(ndtr(np.linspace(-7.5, 7.5, 601)))
