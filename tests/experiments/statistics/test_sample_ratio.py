"""The sample-ratio test against its authors' numbers, SciPy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from quickchange_server.experiments.statistics.ratio import (
    Segment,
    dirichlet_evidence,
    sample_ratio,
)

# Log marginal likelihoods (mixture, null) in the unit tests of the authors' package ssrm_test
# (M. Lindon, Optimizely 2020): nulls 0.4, 0.4, 0.2, Dirichlet(1, 1, 1), counts of four hours.
HOURS = np.array([[20, 17, 9], [18, 21, 8], [4, 6, 4], [18, 19, 11]], dtype=float)
NULL = np.array([0.4, 0.4, 0.2])
MARGINALS = [
    (-7.028201432058012, -4.0776406466061985),
    (-11.947847738358888, -8.265946861099877),
    (-15.471401950257842, -11.610743519545139),
    (-19.96484521090386, -15.781031228536165),
]


@pytest.mark.parametrize("hours", [1, 2, 3, 4])
def test_the_evidence_is_that_of_the_authors_package(hours: int) -> None:
    mixture, null = MARGINALS[hours - 1]
    found = dirichlet_evidence(HOURS[:hours].sum(axis=0), NULL, np.ones(3))
    assert float(found) == pytest.approx(mixture - null, rel=1e-9)


def test_it_is_scipys_dirichlet_multinomial_over_its_multinomial() -> None:
    counts, prior = np.array([30, 41, 12]), np.array([4.0, 4.0, 2.0])
    expected = stats.dirichlet_multinomial(prior, 83).logpmf(counts) - stats.multinomial(
        83, NULL
    ).logpmf(counts)
    assert float(dirichlet_evidence(counts, NULL, prior)) == pytest.approx(expected, rel=1e-9)


def test_units_as_promised_raise_no_alarm() -> None:
    found = sample_ratio([Segment(np.array([9.0, 1.0]), np.array([9000.0, 1000.0]))], 2)
    assert found.p_value == 1.0
    np.testing.assert_allclose(found.expected, [9000, 1000])


def test_a_shortfall_of_a_variant_raises_one() -> None:
    found = sample_ratio([Segment(np.array([1.0, 1.0]), np.array([5000.0, 4500.0]))], 2)
    assert found.p_value < 1e-3


def test_a_segment_cut_in_two_says_the_same() -> None:
    weights = np.array([2.0, 1.0, 1.0])
    whole = sample_ratio([Segment(weights, np.array([560.0, 230.0, 250.0]))], 3)
    halves = [np.array([300.0, 80.0, 150.0]), np.array([260.0, 150.0, 100.0])]
    cut = sample_ratio([Segment(weights, counts) for counts in halves], 3)
    assert cut.p_value == pytest.approx(whole.p_value, rel=1e-9)
    assert 0 < whole.p_value < 1


def test_changed_weights_are_expected_stretch_by_stretch() -> None:
    ramp = [
        Segment(np.array([9.0, 1.0]), np.array([900.0, 100.0])),
        Segment(np.array([1.0, 1.0]), np.array([500.0, 500.0])),
    ]
    found = sample_ratio(ramp, 2)
    assert found.p_value == 1.0
    np.testing.assert_allclose(found.expected, [1400, 600])
    np.testing.assert_allclose(found.observed, [1400, 600])


def test_evidence_carries_over_a_change_of_weights() -> None:
    # each stretch alone is not enough: the second starts where the first has pointed
    parts = [
        Segment(np.array([1.0, 1.0]), np.array([770.0, 890.0])),
        Segment(np.array([3.0, 1.0]), np.array([1770.0, 690.0])),
    ]
    together = sample_ratio(parts, 2).p_value
    assert together < min(sample_ratio([part], 2).p_value for part in parts)


def test_it_stays_below_its_rate_under_peeking_while_weights_change() -> None:
    rng = np.random.default_rng(6)
    weights = [np.array([99.0, 1.0]), np.array([9.0, 1.0]), np.array([1.0, 1.0])]
    alarms = 0
    for _ in range(200):
        done: list[Segment] = []
        lowest = 1.0
        for shares in weights:
            blocks = rng.multinomial(100, shares / shares.sum(), size=10).cumsum(axis=0)
            for counts in blocks.astype(float):
                lowest = min(lowest, sample_ratio([*done, Segment(shares, counts)], 2).p_value)
            done.append(Segment(shares, blocks[-1].astype(float)))
        alarms += lowest < 0.05
    assert alarms / 200 <= 0.05


def test_a_variant_without_a_share_can_have_no_unit() -> None:
    weights = np.array([1.0, 0.0])
    assert sample_ratio([Segment(weights, np.array([50.0, 0.0]))], 2).p_value == 1.0
    assert sample_ratio([Segment(weights, np.array([50.0, 1.0]))], 2).p_value == 0.0


def test_no_units_yet_raise_no_alarm() -> None:
    assert sample_ratio([], 2).p_value == 1.0


@pytest.mark.parametrize(
    ("weights", "counts", "named"),
    [
        ([0.0, 0.0], [1.0, 1.0], "weights"),
        ([1.0, -1.0], [1.0, 1.0], "weights"),
        ([1.0, 1.0], [-1.0, 1.0], "counts"),
    ],
)
def test_impossible_segments_are_refused(
    weights: list[float], counts: list[float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        sample_ratio([Segment(np.array(weights), np.array(counts))], 2)
