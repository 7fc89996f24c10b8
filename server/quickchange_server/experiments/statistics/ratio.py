"""Sample ratio mismatch: do the variants get the shares of units that their weights promise?

The sequential multinomial test of Lindon and Malek, "Anytime-valid inference for multinomial count
data" (NeurIPS 2022; arXiv 2011.03567): the evidence of a Dirichlet mixture against the weights,
valid however often one looks.

Weights may have changed. Each stretch of constant weights is a `Segment` with its own null. Its
Dirichlet prior is centred on the weights tilted by what came before (observed over expected),
which only looks back, so the product stays a martingale; if the weights didn't change, it is the
posterior, and the result that of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, xlogy

from quickchange_server.experiments.statistics.moments import Floats

CONCENTRATION = 100.0  # prior units: how near to the weights a mismatch is looked for


@dataclass(frozen=True)
class Segment:
    """Units first seen while the weights stood so. [V] each; weights need not sum to 1."""

    weights: Floats
    counts: Floats


@dataclass(frozen=True)
class Ratio:
    """`p_value` is always-valid. [V] each."""

    observed: Floats
    expected: Floats
    p_value: float


def sample_ratio(
    segments: Iterable[Segment], variants: int, concentration: float = CONCENTRATION
) -> Ratio:
    """Test the counts of all segments, in the order of time.

    Raises ValueError for a weight or a count below zero, or weights that are all zero.
    """
    observed = expected = np.zeros(variants)
    log_evidence = 0.0
    for segment in segments:
        shares = _shares(segment)
        tilt = (observed + concentration * shares) / np.where(
            shares > 0, expected + concentration * shares, 1.0
        )
        centre = shares * tilt / np.sum(shares * tilt)
        prior = (concentration + np.sum(observed)) * centre
        log_evidence += float(dirichlet_evidence(segment.counts, shares, prior))
        observed = observed + segment.counts
        expected = expected + np.sum(segment.counts) * shares
    return Ratio(observed, expected, math.exp(min(-log_evidence, 0.0)))


def dirichlet_evidence(counts: Floats, shares: Floats, prior: Floats) -> Floats:
    """log of the Bayes factor of Dirichlet(`prior`) against `shares`. [..., V] to [...]

    Infinite where a variant without a share has units.
    """
    whole = np.sum(prior, axis=-1)
    units = np.sum(counts, axis=-1)
    live = prior > 0
    safe = np.where(live, prior, 1.0)
    gained = np.where(live, gammaln(safe + counts) - gammaln(safe), 0.0)
    mixture = np.sum(gained, axis=-1) + gammaln(whole) - gammaln(whole + units)
    return np.asarray(mixture - np.sum(xlogy(counts, shares), axis=-1))


def _shares(segment: Segment) -> Floats:
    if np.any(segment.weights < 0) or not np.sum(segment.weights) > 0:
        raise ValueError(f"weights {segment.weights.tolist()}: none below zero, one above it")
    if np.any(segment.counts < 0):
        raise ValueError(f"counts {segment.counts.tolist()}: none below zero")
    return np.asarray(segment.weights / np.sum(segment.weights))
