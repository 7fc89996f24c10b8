"""Proportions' confidence sequences against SciPy's distributions and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from quickchange_server.experiments.statistics.sequential import proportion_interval as interval


@pytest.mark.parametrize(("hits", "count"), [(1, 10), (50, 100), (3, 1000), (999, 1000)])
def test_the_ends_are_where_scipys_beta_binomial_is_1_in_alpha_likelier(
    hits: int, count: int
) -> None:
    mixture = stats.betabinom(count, 1, 1).pmf(hits)
    for end in interval(hits, count, 0.05):
        assert mixture / stats.binom(count, end).pmf(hits) == pytest.approx(20, rel=1e-6)


def test_it_holds_clopper_and_pearsons_interval() -> None:
    low, high = interval(30, 200, 0.05)
    once = stats.binomtest(30, 200).proportion_ci(0.95, method="exact")
    assert low < once.low
    assert once.high < high


def test_nothing_seen_leaves_everything_possible() -> None:
    assert interval(0, 0, 0.05) == (0.0, 1.0)


def test_only_misses_leave_zero_possible_and_only_hits_one() -> None:
    assert interval(0, 500, 0.05)[0] == 0.0
    assert interval(500, 500, 0.05)[1] == 1.0
    assert 0 < interval(0, 500, 0.05)[1] < 0.03


@pytest.mark.parametrize("rate", [0.5, 0.05, 0.01])
def test_it_covers_the_rate_at_all_looks_in_enough_runs(rate: float) -> None:
    rng = np.random.default_rng(3)
    counts = np.arange(50, 3001, 50)
    missed = 0
    for _ in range(200):
        hits = np.cumsum(rng.binomial(50, rate, size=len(counts)))
        # the mixture against the true rate decides as the interval does, and is faster
        logs = stats.betabinom(counts, 1, 1).logpmf(hits) - stats.binom(counts, rate).logpmf(hits)
        worst = int(np.argmax(logs))
        low, high = interval(float(hits[worst]), float(counts[worst]), 0.05)
        missed += not low <= rate <= high
    assert missed / 200 <= 0.05


def test_units_between_0_and_1_are_covered_too() -> None:
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(100):
        values = rng.beta(0.4, 1.6, size=(40, 50)).sum(axis=1).cumsum()  # mean 0.2
        ends = [interval(s, 50.0 * (k + 1), 0.05) for k, s in enumerate(values)]
        missed += any(not low <= 0.2 <= high for low, high in ends)
    assert missed / 100 <= 0.05
