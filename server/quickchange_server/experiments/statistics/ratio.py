"""Test for sample ratio mismatch: the variants' shares of units against their weights.

The sequential multinomial test of Lindon and Malek, "Anytime-valid inference for multinomial count
data" (NeurIPS 2022; arXiv 2011.03567): the evidence of a Dirichlet mixture against the weights,
valid however often one looks.

Weights may change. Each stretch of constant weights is a `Segment` with its own null hypothesis.
Its Dirichlet prior is centred on the weights, tilted by the ratio of observed to expected counts
of earlier segments; it depends only on the past, so the product stays a martingale. If the weights
did not change, it is the posterior, and the result is that of a single segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from quickchange_server.experiments.statistics.moments import Floats

CONCENTRATION = 100.0  # prior units; larger values look for mismatches nearer to the weights


@dataclass(frozen=True)
class Segment:
    """Weights, and the units first seen under them. [V] each; weights need not sum to 1."""

    weights: Floats
    counts: Floats


@dataclass(frozen=True)
class Ratio:
    """Observed and expected units, [V] each, and the always-valid p-value of their mismatch."""

    observed: Floats
    expected: Floats
    p_value: float


def sample_ratio(
    segments: Iterable[Segment], variants: int, concentration: float = CONCENTRATION
) -> Ratio:
    """Test the counts of all segments, given in order of time.

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
    """Log Bayes factor of Dirichlet(`prior`) against `shares`. [..., V] to [...]

    Infinite if a variant without a share has units.
    """
    from scipy.special import gammaln, xlogy  # as in best.py

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
