"""From sums to a result: decisions, corrections, minimums, JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.experiments.statistics.analysis import (
    OutcomeSums,
    StretchUnits,
    Sums,
    analyse,
    decide,
)
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.experiments.statistics.result_types import ExperimentResult

EVEN = [StretchUnits((1, 1), (1000, 1000))]


def flag(*hits: int, count: int = 1000, **more: object) -> OutcomeSums:
    return OutcomeSums("liked", "flag", [[Sums(count, h, h) for h in hits]], **more)  # type: ignore[arg-type]


def number(*means: float, count: int = 1000, **more: object) -> OutcomeSums:
    """Units of variance 1."""
    sums = [Sums(count, mean * count, (count - 1) + count * mean**2) for mean in means]
    return OutcomeSums("score", "number", [sums], **more)  # type: ignore[arg-type]


def result(*outcomes: OutcomeSums, plan: Plan | None = None) -> ExperimentResult:
    names = ["base", "new", "newer"][: len(outcomes[0].sums[0])]
    stretch = StretchUnits([1] * len(names), [1000] * len(names))
    return analyse(names, outcomes, [stretch], plan or Plan())


@pytest.mark.parametrize(
    ("interval", "more", "expected"),
    [
        ((0.1, 0.2), {}, "better"),
        ((-0.2, -0.1), {}, "worse"),
        ((0.1, 0.2), {"goal": "decrease"}, "worse"),
        ((-0.2, -0.1), {"goal": "decrease"}, "better"),
        ((-0.1, 0.2), {}, "keep collecting"),
        ((-0.1, 0.2), {"margin": 0.3}, "no relevant difference"),
        ((0.1, 0.2), {"margin": 0.3}, "no relevant difference"),
        ((-0.1, 0.2), {"margin": 0.15}, "keep collecting"),
        ((0.1, 0.2), {"margin": 0.15}, "better"),
        ((math.nan, math.nan), {"margin": 0.3}, "keep collecting"),
    ],
)
def test_a_decision_follows_from_the_interval(
    interval: tuple[float, float], more: dict[str, object], expected: str
) -> None:
    assert decide(interval, enough=True, **more) == expected  # type: ignore[arg-type]


def test_nothing_is_decided_below_the_minimum_sample() -> None:
    assert decide((5.0, 6.0), enough=False) == "keep collecting"
    few = result(number(0.0, 9.0, count=99)).outcomes[0].comparisons[0]
    assert (few.enough, few.needed_units, few.decision) == (False, 100, "keep collecting")
    assert result(number(0.0, 9.0, count=100)).outcomes[0].comparisons[0].decision == "better"


def test_a_small_variant_beside_a_large_one_needs_more_units() -> None:
    sums = [Sums(9000, 0, 8999), Sums(900, 900, 1799)]
    found = analyse(["a", "b"], [OutcomeSums("x", "number", [sums])], EVEN, Plan())
    comparison = found.outcomes[0].comparisons[0]
    assert comparison.needed_units == 1360
    assert comparison.decision == "keep collecting"


def test_a_rare_flag_needs_enough_units_of_each_value() -> None:
    assert not result(flag(1, 18)).outcomes[0].comparisons[0].enough
    assert result(flag(1, 19)).outcomes[0].comparisons[0].enough
    assert not result(flag(999, 982)).outcomes[0].comparisons[0].enough


def test_a_plain_difference_is_found_in_the_direction_of_the_goal() -> None:
    assert result(flag(500, 620)).outcomes[0].comparisons[0].decision == "better"
    assert result(flag(500, 620, goal="decrease")).outcomes[0].comparisons[0].decision == "worse"


def test_equal_variants_are_called_so_once_the_margin_is_resolved() -> None:
    wide = result(flag(500, 500, margin=0.03)).outcomes[0].comparisons[0]
    fine = result(flag(20_000, 20_000, count=40_000, margin=0.03)).outcomes[0].comparisons[0]
    assert wide.decision == "keep collecting"
    assert fine.decision == "no relevant difference"


def test_two_comparisons_divide_the_error_rate() -> None:
    alone = result(number(0.0, 0.1)).outcomes[0].comparisons[0]
    both = result(number(0.0, 0.1, 0.1)).outcomes[0]
    assert both.comparisons_corrected == 2
    assert alone.p_value is not None
    assert both.comparisons[0].p_value == pytest.approx(min(1.0, 2 * alone.p_value))
    half = result(number(0.0, 0.1), plan=Plan(alpha=0.025)).outcomes[0].comparisons[0]
    assert alone.interval is not None
    assert both.comparisons[0].interval is not None
    assert half.interval is not None
    assert both.comparisons[0].interval[0] < alone.interval[0]
    assert both.comparisons[0].interval[0] == pytest.approx(half.interval[0], rel=0.02)


def test_the_labels_of_an_outcome_divide_it_too() -> None:
    sums = [Sums(1000, 300, 300), Sums(1000, 350, 350)]
    short = OutcomeSums("tone", "label", [sums], label="short", labels=4)
    found = result(short).outcomes[0]
    assert (found.label, found.comparisons_corrected) == ("short", 4)
    assert found.variants[1].mean == 0.35


def test_a_wrong_share_of_units_is_warned_of() -> None:
    off = analyse(["a", "b"], [], [StretchUnits((1, 1), (5000, 4500))], Plan())
    assert off.ratio.mismatch
    assert off.ratio.observed == {"a": 5000, "b": 4500}
    assert off.ratio.expected == {"a": 4750.0, "b": 4750.0}
    assert not analyse(["a", "b"], [], EVEN, Plan()).ratio.mismatch


def test_an_experiment_without_outcomes_yet_is_json_without_nan() -> None:
    empty = result(flag(0, 0, count=0), number(0.0, 0.0, count=1)).to_json()
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty
    first = empty["outcomes"][0]
    assert first["variants"][0]["mean"] is None
    assert first["variants"][0]["interval"] == [0.0, 1.0]
    assert first["comparisons"][0]["decision"] == "keep collecting"
    assert empty["outcomes"][1]["comparisons"][0]["interval"] is None


def test_a_full_result_is_json_as_documented() -> None:
    shown = result(flag(500, 620)).to_json()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert list(shown) == ["alpha", "minimum_events", "method", "ratio", "outcomes"]
    assert shown["outcomes"][0]["comparisons"][0]["decision"] == "better"
    assert shown["outcomes"][0]["variants"][1]["probability_best"] > 0.99


@pytest.mark.parametrize(
    ("outcome", "named"),
    [
        (OutcomeSums("x", "flag", [[Sums(10, 11, 11), Sums(10, 1, 1)]]), "'x' of variant 'a'"),
        (OutcomeSums("x", "flag", [[Sums(10, 1, 1), Sums(10, 1, 4)]]), "'x' of variant 'b'"),
        (OutcomeSums("x", "number", [[Sums(-1, 1, 1), Sums(10, 1, 4)]]), "count -1"),
        (OutcomeSums("x", "number", [[Sums(1, math.nan, 1), Sums(10, 1, 4)]]), "sum nan"),
        (OutcomeSums("x", "number", [[Sums(10, 1, 4)]]), "sums of 1 variants: give 2"),
        (OutcomeSums("x", "number", []), "'x' has no sums"),
    ],
)
def test_impossible_sums_are_refused_by_name(outcome: OutcomeSums, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        analyse(["a", "b"], [outcome], EVEN, Plan())


@pytest.mark.parametrize("variants", [["a"], ["a", "a"]])
def test_fewer_than_two_variants_are_refused(variants: list[str]) -> None:
    with pytest.raises(ValueError, match="two or more"):
        analyse(variants, [], [], Plan())


def test_a_stretch_of_another_number_of_variants_is_refused() -> None:
    with pytest.raises(ValueError, match="give 2 of each"):
        analyse(["a", "b"], [], [StretchUnits((1, 1, 1), (1, 1, 1))], Plan())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 0.6),
        ("ratio_threshold", 0.0),
        ("minimum_units", 1),
        ("minimum_units_uneven", 99),
        ("minimum_events", -1),
        ("sharpest_at", 0.0),
    ],
)
def test_a_plan_refuses_a_bad_value_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        Plan(**{setting: value})  # type: ignore[arg-type]


def test_stretches_are_compared_each_within_itself() -> None:
    # 10 % then 50 % of units, and all outcomes rise by 1 between: no effect
    rows = [
        [Sums(900, 0.0, 899.0), Sums(100, 0.0, 99.0)],
        [Sums(2500, 2500.0, 5000.0), Sums(2500, 2500.0, 5000.0)],
    ]
    found = analyse(["a", "b"], [OutcomeSums("x", "number", rows)], EVEN, Plan()).outcomes[0]
    assert found.comparisons[0].difference == pytest.approx(0.0, abs=1e-12)
    assert found.variants[1].count == 2600
    assert found.variants[1].mean == pytest.approx(2500 / 2600)


# --- intervals end where what can be ends -------------------------------------------------------

COUNTS = st.integers(2, 300)


@settings(deadline=None, max_examples=25)
@given(count=COUNTS, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_intervals_of_shares_stay_within_what_shares_and_their_differences_can_be(
    count: int, shares: tuple[float, float]
) -> None:
    [outcome] = result(flag(*(round(share * count) for share in shares), count=count)).outcomes
    for variant in outcome.variants:
        assert variant.interval is not None
        assert 0 <= variant.interval[0] <= variant.interval[1] <= 1
    [comparison] = outcome.comparisons
    if comparison.interval is not None and comparison.difference is not None:
        low, high = comparison.interval
        assert -1 <= low <= comparison.difference <= high <= 1


@settings(deadline=None, max_examples=25)
@given(count=COUNTS, means=st.tuples(st.floats(0, 10), st.floats(0, 10)))
def test_intervals_of_numbers_end_at_their_least_where_they_have_one(
    count: int, means: tuple[float, float]
) -> None:
    [free] = result(number(*means, count=count)).outcomes
    [bound] = result(number(*means, count=count, least=0.0)).outcomes
    for wide, cut in zip(free.variants, bound.variants, strict=True):
        assert wide.interval is not None
        assert cut.interval == (max(wide.interval[0], 0.0), wide.interval[1])
    assert free.comparisons == bound.comparisons  # a difference may have either sign


def test_a_number_without_a_least_may_lie_below_zero() -> None:
    [outcome] = result(number(0.0, 0.1, count=100)).outcomes
    assert outcome.variants[0].interval is not None
    assert outcome.variants[0].interval[0] < 0
