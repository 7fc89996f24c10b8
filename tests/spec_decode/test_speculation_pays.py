"""The whole policy on a machine that is known: never much slower than no drafts, near the best.

The engine's own speculation plays made-up texts (`DraftReplay`): their true prices, what drafting
costs, and which drafts hold. It sees what it would see in an engine. The host takes no time.
"""

from __future__ import annotations

import random
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from recorded_drafts import HEADS, NO_TEXT, Confidence, linear_prices, recorded_task

from quickchange_bench.engine.draft_oracle import Oracle
from quickchange_bench.engine.draft_recording import MachinePrices, RecordedTask
from quickchange_bench.engine.draft_replay import DraftReplay, Played, PricedMachine

CPU = MachinePrices(
    ((1, 0.021), (4, 0.023), (8, 0.026), (16, 0.040), (32, 0.062), (256, 0.370)),
    ((1, 0.0004), (32, 0.002)),
)
TEXTS = 64

sequences = st.sampled_from([1, 4, 16])
prices = st.builds(
    linear_prices, st.floats(0.003, 0.1), st.floats(1e-5, 2e-3), st.floats(1e-5, 5e-4)
)


def played(task: RecordedTask, lanes: int, machine: PricedMachine) -> tuple[Played, Played, Played]:
    """Without drafts; with drafts from the first step on; the second half of that."""
    replay = DraftReplay(task, lanes, machine, NO_TEXT, lambda: 0.0)
    sums = replay.online()
    return replay.off()[-1], sums[-1], sums[-1] - sums[len(sums) // 2]


def even(p: float) -> Confidence:
    """Every draft holds with chance p, and the heads know nothing of which."""
    return lambda _: (0.6, p)


def calibrated(chance: random.Random) -> tuple[float, float]:
    """Half of the drafts are nearly sure, half nearly hopeless, and the heads know which."""
    p = chance.choice([0.05, 0.97])
    return p, p


def overconfident(_: random.Random) -> tuple[float, float]:
    """Heads trained for something else: sure, and wrong."""
    return 0.9, 0.03


@settings(max_examples=12, deadline=None)
@given(st.floats(0.0, 1.0), sequences, prices)
@example(0.7, 1, CPU)
@example(0.9, 16, CPU)
def test_drafting_comes_within_a_tenth_of_an_oracle_that_knows_the_rates(
    p: float, lanes: int, priced: MachinePrices
) -> None:
    task, machine = recorded_task(even(p), texts=TEXTS), PricedMachine(priced)
    _, online, later = played(task, lanes, machine)
    oracle = Oracle.of(task, NO_TEXT, "rates").best(lanes, machine, online.rate)
    assert later.rate >= 0.9 * oracle.rate


@settings(max_examples=12, deadline=None)
@given(st.floats(0.0, 0.02), sequences, prices)
@example(0.0, 1, CPU)
@example(0.0, 16, CPU)
def test_worthless_drafts_cost_at_most_a_fiftieth(
    p: float, lanes: int, priced: MachinePrices
) -> None:
    task = recorded_task(even(p), texts=TEXTS)
    off, online, later = played(task, lanes, PricedMachine(priced))
    assert online.rate >= 0.98 * off.rate
    assert later.rate >= 0.98 * off.rate


@pytest.mark.parametrize("lanes", [1, 4, 16, 32])
def test_heads_that_are_sure_and_wrong_cost_at_most_a_fiftieth(lanes: int) -> None:
    off, online, _ = played(recorded_task(overconfident, texts=TEXTS), lanes, PricedMachine(CPU))
    assert online.rate >= 0.98 * off.rate


def test_drafts_that_hold_are_left_where_the_host_takes_longer_than_they_save() -> None:
    """Every reading of the clock finds the host 10 ms on, of steps of 5."""
    ticks = iter(range(10**9))
    task, machine = recorded_task(even(0.9), texts=TEXTS), PricedMachine(linear_prices(0.005, 1e-5))
    slow = DraftReplay(task, 4, machine, NO_TEXT, lambda: 0.010 * next(ticks)).online()
    rested = [after.rows == before.rows for before, after in pairwise(slow)]
    assert sum(rested) > 0.5 * len(rested)


@pytest.mark.parametrize("lanes", [4, 16])
def test_heads_that_know_when_they_are_right_beat_every_fixed_depth(lanes: int) -> None:
    task, machine = recorded_task(calibrated, texts=TEXTS), PricedMachine(CPU)
    _, online, later = played(task, lanes, machine)
    oracle = Oracle.of(task, NO_TEXT, "rates").best(lanes, machine, online.rate)
    assert later.rate >= 0.9 * oracle.rate
    assert later.rate >= 1.05 * max(
        fixed(lanes, machine, depth, 0.51) for depth in range(HEADS + 1)
    )


def fixed(lanes: int, machine: PricedMachine, depth: int, p: float) -> float:
    """Tokens a second to expect of `depth` drafts a sequence that hold with chance p each."""
    tokens = lanes * sum(p**held for held in range(depth + 1))
    return tokens / (machine.step(lanes * (1 + depth)) + machine.drafting([depth] * lanes))
