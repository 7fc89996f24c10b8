"""Confidence sequences against published numbers, SciPy's fixed-size tests and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from quickchange_server.experiments.statistics.moments import Moments, pooled
from quickchange_server.experiments.statistics.sequential import (
    Estimate,
    best_mixing,
    differences,
    half_width,
    log_evidence,
    means,
    p_value,
)


def one(value: float, error: float, units: float) -> Estimate:
    return Estimate(np.array(value), np.array(error), np.array(units))


def of(*samples: np.ndarray) -> Moments:
    return Moments(
        "number",
        np.array([float(len(sample)) for sample in samples]),
        np.array([sample.sum() for sample in samples]),
        np.array([np.square(sample).sum() for sample in samples]),
    )


# The authors' package confseq (Howard, Waudby-Smith and Ramdas): its unit tests of the two-sided
# normal mixture tuned for intrinsic time 100 at alpha 0.05, from their reference in R.
CONFSEQ_RHO, CONFSEQ_LOG_MARTINGALE, CONFSEQ_BOUND = 12.60056, -0.6510052, 30.35209


def test_the_mixing_is_that_of_the_authors_package() -> None:
    assert best_mixing(100, 0.05) == pytest.approx(CONFSEQ_RHO, abs=1e-5)


def test_the_martingale_is_that_of_the_authors_package() -> None:
    total, time = 10.0, 100.0  # S and v there: an estimate of S / v with variance 1 / v
    found = log_evidence(one(total / time, time**-0.5, time), best_mixing(100, 0.05))
    assert float(found) == pytest.approx(CONFSEQ_LOG_MARTINGALE, abs=1e-5)


def test_the_bound_is_that_of_the_authors_package() -> None:
    time = 100.0
    found = half_width(one(0, time**-0.5, time), 0.05, best_mixing(100, 0.05))
    assert float(found) * time == pytest.approx(CONFSEQ_BOUND, abs=1e-5)


def test_the_interval_is_that_of_growthbooks_published_example() -> None:
    # gbstats' test_sequential_test_runs: 3,000 and 3,461 units, tuned for 1,000, an estimate of
    # 0.50336 with standard error 0.33341 has the interval -0.55844 to 1.56516
    found = half_width(one(0.50336, 0.33341, 6461), 0.05, best_mixing(1000, 0.05))
    assert 0.50336 - float(found) == pytest.approx(-0.55844, abs=1e-4)
    assert 0.50336 + float(found) == pytest.approx(1.56516, abs=1e-4)


def test_a_difference_has_welchs_statistic() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 400), rng.normal(3.2, 2, 700)
    found = differences([of(a, b)])
    expected = stats.ttest_ind(b, a, equal_var=False).statistic
    assert float(found.value[0] / found.error[0]) == pytest.approx(expected, rel=1e-9)


def test_a_mean_has_the_standard_error_of_its_sample() -> None:
    sample = np.random.default_rng(1).normal(3, 1, 400)
    assert means(of(sample)).error[0] == pytest.approx(stats.sem(sample), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_interval_excludes_zero_where_the_p_value_is_below_alpha(alpha: float) -> None:
    rho = best_mixing(1000, 0.05)
    value = np.linspace(-5, 5, 2001)
    estimate = Estimate(value, np.ones_like(value), np.full_like(value, 300.0))
    outside = np.abs(value) > half_width(estimate, alpha, rho)
    assert 0 < outside.sum() < len(value)
    np.testing.assert_array_equal(outside, p_value(estimate, rho) < alpha)


def test_it_is_never_surer_than_one_look_at_the_end() -> None:
    units = np.geomspace(2, 1e7, 200)
    estimate = Estimate(np.zeros(200), np.ones(200), units)
    assert half_width(estimate, 0.05, best_mixing(1000, 0.05)).min() > stats.norm.isf(0.025)


def test_it_is_narrowest_against_one_look_near_where_it_is_tuned() -> None:
    units = np.geomspace(10, 1e6, 2000)
    estimate = Estimate(np.zeros(2000), units**-0.5, units)
    widths = {at: half_width(estimate, 0.05, best_mixing(at, 0.05)) for at in (300, 1000, 3000)}
    here = int(np.argmin(np.abs(units - 1000)))
    assert widths[1000][here] < min(widths[300][here], widths[3000][here])


def test_equal_variants_clock_is_their_size_and_uneven_ones_lies_between() -> None:
    rng = np.random.default_rng(2)
    even = differences([of(rng.normal(size=500), rng.normal(size=500))])
    uneven = differences([of(rng.normal(size=5000), rng.normal(size=50))])
    assert even.units[0] == pytest.approx(500)
    assert 50 < uneven.units[0] < 150


def test_the_mixture_is_a_martingale() -> None:
    # its expectation under the null, by quadrature over the standard normal
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    estimate = Estimate(nodes, np.ones_like(nodes), np.full_like(nodes, 40.0))
    evidence = np.exp(log_evidence(estimate, 100.0))
    assert np.sum(evidence * weights) / np.sum(weights) == pytest.approx(1.0, rel=1e-6)


def test_one_unit_or_no_spread_has_no_interval() -> None:
    moments = Moments(
        "number", np.array([0.0, 1.0, 9.0]), np.array([0.0, 2.0, 9.0]), np.array([0.0, 4.0, 9.0])
    )
    rho = best_mixing(1000, 0.05)
    assert np.isnan(half_width(differences([moments]), 0.05, rho)).all()
    assert np.isnan(p_value(differences([moments]), rho)).all()


def test_a_flag_that_one_variant_has_not_seen_is_not_taken_for_impossible() -> None:
    moments = Moments("flag", np.array([100.0, 100.0]), np.array([0.0, 3.0]), np.array([0.0, 3.0]))
    error = float(means(moments).error[0])
    assert error == pytest.approx(np.sqrt((1 / 102) * (101 / 102) / 100), rel=1e-9)


def test_a_drift_under_changing_shares_is_no_difference() -> None:
    # no effect, but the second stretch's outcomes are 10 higher and more of them are the variant's
    rng = np.random.default_rng(8)
    days = [
        of(rng.normal(0, 1, 900), rng.normal(0, 1, 100)),
        of(rng.normal(10, 1, 500), rng.normal(10, 1, 500)),
    ]
    apart, together = differences(days), differences([pooled(days)])
    assert abs(float(apart.value[0])) < 0.2
    assert float(together.value[0]) > 4


def test_strata_are_weighted_by_information_as_one_clock() -> None:
    rng = np.random.default_rng(9)
    sample = [rng.normal(size=(2, 300)), rng.normal(size=(2, 700))]
    strata = [of(*pair) for pair in sample]
    found, whole = differences(strata), differences([pooled(strata)])
    # equal shares in all stretches: the same as without strata
    assert float(found.value[0]) == pytest.approx(float(whole.value[0]), rel=1e-9)
    assert float(found.error[0]) == pytest.approx(float(whole.error[0]), rel=1e-9)
    assert float(found.units[0]) == pytest.approx(1000, rel=1e-9)


def test_a_stretch_without_a_variant_adds_nothing() -> None:
    rng = np.random.default_rng(10)
    both = of(rng.normal(size=300), rng.normal(size=300))
    empty = Moments("number", np.array([50.0, 0.0]), np.zeros(2), np.zeros(2))
    found, alone = differences([both, empty]), differences([both])
    assert found.value[0] == pytest.approx(alone.value[0], rel=1e-9)
    assert np.isfinite(found.error[0])


def test_no_strata_are_refused() -> None:
    with pytest.raises(ValueError, match="one or more"):
        pooled([])
