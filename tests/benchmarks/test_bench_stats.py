"""Statistics against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_bench.summary_stats import median_of, percentile, ratio, slope, spread

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_percentile_of_nothing_is_none() -> None:
    assert percentile([], 50) is None


def test_a_percentile_above_100_is_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 to 100"):
        percentile([1.0], 101)


def test_slope_is_numpys() -> None:
    times, values = [0.0, 1.0, 2.5, 4.0], [3.0, 4.0, 2.0, 9.0]
    assert slope(times, values) == pytest.approx(np.polyfit(times, values, 1)[0])


@pytest.mark.parametrize("times", [[], [1.0], [2.0, 2.0]])
def test_slope_without_two_times_is_none(times: list[float]) -> None:
    assert slope(times, [1.0] * len(times)) is None


def test_spread_is_relative_to_the_median() -> None:
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert spread([9.0]) is None


def test_median_leaves_out_what_was_not_measured() -> None:
    assert median_of([1.0, None, 3.0]) == 2.0
    assert median_of([None]) is None


def test_ratio_to_nothing_is_none() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, 0.0) is None
    assert ratio(None, 2.0) is None
