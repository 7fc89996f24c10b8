"""The probability of being best against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import betaln

from quickchange_server.experiments.statistics.best import probability_best
from quickchange_server.experiments.statistics.moments import Moments


def flags(*pairs: tuple[int, int]) -> Moments:
    """(Hits, units) of each variant."""
    total = np.array([float(hits) for hits, _ in pairs])
    return Moments("flag", np.array([float(units) for _, units in pairs]), total, total)


def numbers(*triples: tuple[float, float, int]) -> Moments:
    """(Mean, standard deviation, units) of each variant."""
    mean, deviation, count = (np.array(part, dtype=float) for part in zip(*triples, strict=True))
    squares = deviation**2 * (count - 1) + count * mean**2
    return Moments("number", count, count * mean, squares)


def second_beats_first(a: tuple[int, int], b: tuple[int, int]) -> float:
    """The closed form that E. Miller published ("Formulas for Bayesian A/B testing", 2015)."""
    (one, no_one), (two, no_two) = ((1 + hits, 1 + units - hits) for hits, units in (a, b))
    i = np.arange(two)
    terms = betaln(one + i, no_one + no_two) - betaln(1 + i, no_two) - betaln(one, no_one)
    return float(np.sum(np.exp(terms) / (no_two + i)))


@pytest.mark.parametrize(
    ("a", "b"),
    [((10, 100), (14, 100)), ((1, 1000), (4, 900)), ((500, 1000), (520, 1000)), ((3, 5), (40, 99))],
)
def test_flags_agree_with_millers_formula(a: tuple[int, int], b: tuple[int, int]) -> None:
    found = probability_best(flags(a, b), "increase")
    assert found[1] == pytest.approx(second_beats_first(a, b), abs=1e-4)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("one", "two"),
    [((0.0, 1.0, 100), (0.2, 1.0, 100)), ((0.0, 1.0, 100), (0.001, 1.0, 10**6))],
)
def test_two_numbers_agree_with_the_normal_of_their_difference(
    one: tuple[float, float, int], two: tuple[float, float, int]
) -> None:
    error = np.sqrt(one[1] ** 2 / one[2] + two[1] ** 2 / two[2])
    expected = stats.norm.cdf((two[0] - one[0]) / error)
    assert probability_best(numbers(one, two), "increase")[1] == pytest.approx(expected, abs=1e-4)


def test_the_smallest_is_best_where_less_is_better() -> None:
    moments = numbers((1.0, 1.0, 50), (0.9, 1.0, 50), (1.3, 2.0, 80))
    mirrored = numbers((-1.0, 1.0, 50), (-0.9, 1.0, 50), (-1.3, 2.0, 80))
    np.testing.assert_allclose(
        probability_best(moments, "decrease"), probability_best(mirrored, "increase"), atol=1e-6
    )


def test_four_equal_variants_share_it() -> None:
    np.testing.assert_allclose(
        probability_best(flags(*[(30, 100)] * 4), "increase"), 0.25, atol=1e-6
    )


def test_three_variants_agree_with_draws_from_their_posteriors() -> None:
    moments = flags((10, 100), (14, 110), (40, 300))
    rng = np.random.default_rng(5)
    drawn = rng.beta(
        1 + moments.total, 1 + moments.count - moments.total, size=(400_000, 3)
    ).argmax(axis=1)
    np.testing.assert_allclose(
        probability_best(moments, "increase"), np.bincount(drawn) / len(drawn), atol=4e-3
    )


def test_a_variant_with_no_posterior_leaves_all_without() -> None:
    assert np.isnan(probability_best(flags((0, 0), (5, 10)), "increase")).all()
