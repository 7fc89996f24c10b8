"""Probability that each variant is the best: a description, never the decision rule.

The posterior has a flat prior: Beta(1 + total, 1 + count - total) for flags, the normal
approximation for numbers. It is integrated numerically, so the same data give the same digits.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import stats

from quickchange_server.experiments.statistics.moments import Floats, Moments

Goal = Literal["increase", "decrease"]
_NODES = stats.norm.cdf(np.linspace(-7.5, 7.5, 601))  # quantiles of each posterior


def probability_best(moments: Moments, goal: Goal) -> Floats:
    """The probability for each variant, [V]; all NaN if one has too few units for a posterior."""
    variance = moments.working_variance
    if np.any(moments.count < 2) or not np.all(variance > 0):
        return np.full(moments.count.shape, np.nan)
    posterior = _posterior(moments, variance)
    # The quantiles of every posterior, so that a narrow one beside a wide one is resolved too.
    points = np.unique(posterior.ppf(_NODES[:, None]))
    below = posterior.cdf(points[:, None])  # [points, V]
    beats = below if goal == "increase" else 1 - below
    won = [
        np.trapezoid(np.prod(np.delete(beats, k, axis=1), axis=1), below[:, k])
        for k in range(below.shape[1])
    ]
    return np.asarray(np.array(won) / np.sum(won))


def _posterior(moments: Moments, variance: Floats) -> stats.rv_continuous:
    if moments.kind == "flag":
        return stats.beta(1 + moments.total, 1 + moments.count - moments.total)
    return stats.norm(moments.mean, np.sqrt(variance / moments.count))
