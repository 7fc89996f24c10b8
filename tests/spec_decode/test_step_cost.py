"""The cost of rows: what was measured, in order, and unmoved by a noisy machine."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from quickchange_server.spec_decode.cost_model import DraftCost, StepCost

MEASURED = [(1, 0.021), (4, 0.023), (8, 0.026), (16, 0.040), (32, 0.062), (64, 0.107)]

seconds = st.floats(1e-4, 1.0)
row_counts = st.integers(1, 300)
measurements = st.lists(
    st.tuples(row_counts, seconds), min_size=2, max_size=30, unique_by=lambda point: point[0]
)


@given(measurements, st.lists(st.tuples(row_counts, seconds), max_size=30))
def test_more_rows_never_cost_less_whatever_is_observed(
    points: list[tuple[int, float]], observed: list[tuple[int, float]]
) -> None:
    cost = StepCost(points)
    for rows, took in observed:
        cost.observe(rows, took)
    table = cost.table(400)
    assert len(table) == 401
    assert (np.diff(table) >= -1e-12).all()
    assert (table > 0).all()


def test_says_what_was_measured_and_goes_straight_between_and_beyond() -> None:
    cost = StepCost(MEASURED)
    for rows, took in MEASURED:
        assert cost.seconds(rows) == pytest.approx(took)
    assert cost.seconds(12) == pytest.approx(0.033)
    assert cost.seconds(96) == pytest.approx(0.152)
    assert cost.seconds(0) == pytest.approx(0.021)


def test_of_several_measurements_of_the_same_rows_the_median_counts() -> None:
    assert StepCost([(8, 0.02), (1, 0.01), (8, 0.2), (8, 0.03)]).seconds(8) == pytest.approx(0.03)


def test_counts_measured_in_the_wrong_order_share_their_mean() -> None:
    cost = StepCost([(1, 0.01), (2, 0.03), (4, 0.02), (8, 0.05)])
    assert cost.table(8)[[1, 2, 4, 8]] == pytest.approx([0.01, 0.025, 0.025, 0.05])


@pytest.mark.parametrize("points", [[], [(1, 0.1)], [(4, 0.1), (4, 0.2)]])
def test_one_row_count_is_no_curve(points: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="at least two different row counts"):
        StepCost(points)


@pytest.mark.parametrize("point", [(0, 0.1), (2, 0.0), (2, -1.0)])
def test_points_that_cannot_be_are_refused(point: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        StepCost([(1, 0.1), point])


def test_single_steps_of_five_times_the_length_move_little() -> None:
    chance = random.Random(1)
    cost, true = StepCost(MEASURED), StepCost(MEASURED)
    for _ in range(2_000):
        rows = chance.choice([1, 5, 8, 16, 20])
        outlier = 5.0 if chance.random() < 0.05 else 1.0
        cost.observe(rows, true.seconds(rows) * chance.uniform(0.95, 1.05) * outlier)
    assert cost.table(32)[1:] == pytest.approx(true.table(32)[1:], rel=0.12)
    relative = cost.table(32)[1:] / cost.seconds(1)
    assert relative == pytest.approx(true.table(32)[1:] / true.seconds(1), rel=0.05)


def test_one_outlier_moves_the_cost_by_less_than_five_percent() -> None:
    cost = StepCost(MEASURED)
    cost.observe(8, 5 * cost.seconds(8))
    assert cost.seconds(8) < 1.05 * 0.026


def test_a_slower_minute_at_one_row_count_is_not_taken_for_a_cost_of_rows() -> None:
    cost, true = StepCost(MEASURED), StepCost(MEASURED)
    for _ in range(1_500):
        cost.observe(5, 2 * true.seconds(5))
    assert cost.table(64)[1:] == pytest.approx(2 * true.table(64)[1:], rel=0.08)


def test_a_shape_measured_wrong_is_corrected_by_what_steps_take() -> None:
    true = StepCost(MEASURED)
    wrong = StepCost([(rows, took * (1.3 if rows >= 16 else 1.0)) for rows, took in MEASURED])
    for _ in range(2_000):
        for rows in (1, 8, 16, 32):
            wrong.observe(rows, true.seconds(rows))
    assert wrong.table(32)[[1, 8, 16, 32]] == pytest.approx(
        true.table(32)[[1, 8, 16, 32]], rel=0.01
    )


def test_drafting_costs_what_calls_took_by_passes_and_drafts() -> None:
    cost, chance = DraftCost(), random.Random(2)
    assert cost.seconds([3, 3]) == 0
    for _ in range(300):
        depths = [chance.randint(1, 5) for _ in range(chance.randint(1, 16))]
        outlier = 5.0 if chance.random() < 0.03 else 1.0
        cost.observe(depths, (0.0004 * max(depths) + 0.0001 * sum(depths)) * outlier)
    assert cost.seconds([5] * 16) == pytest.approx(0.010, rel=0.25)
    assert cost.seconds([2]) == pytest.approx(0.001, rel=0.4)


def test_calls_for_one_sequence_say_that_passes_cost_not_drafts() -> None:
    cost = DraftCost()
    for _ in range(10):
        cost.observe([4], 0.002)
    assert cost.seconds([4]) == pytest.approx(0.002, rel=0.01)
    assert cost.seconds([4] * 16) < 0.003


@given(st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=9), seconds)))
def test_drafting_never_costs_less_than_nothing(calls: list[tuple[list[int], float]]) -> None:
    cost = DraftCost()
    for depths, took in calls:
        cost.observe(depths, took)
        assert cost.seconds(depths) >= 0
        assert cost.seconds([1]) >= 0
        assert cost.seconds([*depths, 1]) >= cost.seconds(depths)
