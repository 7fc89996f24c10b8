"""False positives and power under peeking, by simulation: fewer runs than the benchmark's."""

from __future__ import annotations

import pytest

from quickchange_bench.service.experiments_simulation import (
    Design,
    Trial,
    always_valid,
    flag,
    judge,
    lognormal,
    normal,
    ratio_alarms,
    report,
    t_test,
)
from quickchange_server.experiments.statistics.plan import Plan

DESIGN = Design(runs=300, horizon=2000, every=50, seed=11)
POPULATIONS = [normal(), lognormal(1.0), flag(0.5), flag(0.05), flag(0.01)]


@pytest.mark.parametrize("stages", [((1.0, 1.0),), ((1.0,) * 4,), ((9.0, 1.0), (1.0, 1.0))])
@pytest.mark.parametrize("population", POPULATIONS, ids=lambda p: p.name)
def test_no_more_of_equal_variants_are_called_different_than_alpha(
    population: object, stages: tuple[tuple[float, ...], ...]
) -> None:
    (ours,) = judge(Trial(population, stages), DESIGN, Plan(), [always_valid])  # type: ignore[arg-type]
    assert ours.share <= 0.05


def test_a_drift_during_a_ramp_is_not_called_a_difference() -> None:
    ramp = Trial(normal(), ((9.0, 1.0), (1.0, 1.0)), drift=0.3)
    ours, theirs = judge(ramp, DESIGN, Plan(), [always_valid, t_test])
    assert ours.share <= 0.05
    assert theirs.share > 0.9


def test_a_t_test_at_every_look_is_wrong_far_more_often() -> None:
    (theirs,) = judge(Trial(normal()), DESIGN, Plan(), [t_test])
    assert theirs.share > 0.15


@pytest.mark.parametrize(
    ("trial", "most_units"),
    [(Trial(normal(), effect=0.2), 800), (Trial(flag(0.5), effect=0.1), 800)],
)
def test_a_difference_is_found_with_its_sign_and_soon(trial: Trial, most_units: int) -> None:
    (ours,) = judge(trial, DESIGN, Plan(), [always_valid])
    assert ours.share > 0.95
    assert ours.wrong <= 0.01
    assert ours.median_units < most_units


def test_nothing_is_said_below_the_minimum_sample() -> None:
    plan = Plan(minimum_units=1000)
    (ours,) = judge(Trial(normal(), effect=1.0), DESIGN, plan, [always_valid])
    assert ours.median_units >= 1000


def test_right_shares_raise_no_more_alarms_than_promised_and_wrong_ones_do() -> None:
    plan = Plan()
    assert ratio_alarms([0.5, 0.5], [0.5, 0.5], DESIGN, plan).share <= plan.ratio_threshold
    assert ratio_alarms([0.5, 0.5], [0.56, 0.44], DESIGN, plan).share > 0.9


def test_the_same_seed_gives_the_same_runs() -> None:
    small = Design(runs=20, horizon=500, every=50, seed=3)
    trial = Trial(normal(), effect=0.3)
    first, again = (judge(trial, small, Plan(), [always_valid, t_test]) for _ in range(2))
    assert first == again


def test_the_report_has_a_row_for_every_trial() -> None:
    lines = list(report(Design(runs=2, horizon=100, every=50)))
    assert sum(line.startswith("| lognormal") for line in lines) == 12
    assert lines[-1].startswith("| 0.9 : 0.1 | 0.92 : 0.08 |")
