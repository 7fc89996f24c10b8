"""Drafts are bought where they bring most tokens a second, and nowhere else."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given

from quickchange_server.spec_decode.cost_model import StepCost
from quickchange_server.spec_decode.draft_selection import StepLoad, buy_chains, expected_tokens

CPU = StepCost([(1, 0.021), (8, 0.026), (16, 0.040), (32, 0.062)])

chances = st.floats(0.0, 1.0)
some_chains = st.lists(st.lists(chances, max_size=6), min_size=1, max_size=8)


@st.composite
def costs(draw: st.DrawFn) -> StepCost:
    rows = draw(st.lists(st.integers(1, 20), min_size=2, max_size=5, unique=True))
    return StepCost([(r, draw(st.floats(0.01, 0.2))) for r in rows])


def rate(gain: float, count: int, load: StepLoad, cost: StepCost) -> float:
    base = load.decoding + load.prefill
    extra = cost.seconds(base + count) - cost.seconds(base)
    return (load.decoding + gain) / (cost.seconds(load.decoding) + extra)


@given(
    st.lists(st.lists(chances, max_size=4), min_size=3, max_size=3),
    st.integers(0, 12),
    st.integers(0, 8),
    costs(),
)
def test_no_other_choice_brings_more_tokens_a_second(
    chains: list[list[float]], prefill: int, cap: int, cost: StepCost
) -> None:
    load = StepLoad(decoding=3, prefill=prefill, cap=cap)

    def gain(lengths: tuple[int, ...]) -> float:
        return sum(expected_tokens(c[:n]) for c, n in zip(chains, lengths, strict=True))

    choices = product(*(range(len(chain) + 1) for chain in chains))
    best = max(rate(gain(c), sum(c), load, cost) for c in choices if sum(c) <= cap)
    purchase = buy_chains(chains, load, cost)
    assert purchase.gain == pytest.approx(gain(purchase.lengths))
    reached = rate(purchase.gain, sum(purchase.lengths), load, cost)
    assert reached == pytest.approx(best)


@given(some_chains, st.integers(0, 200), st.integers(0, 20), costs(), st.data())
def test_of_chains_beginnings_are_bought_within_the_cap_and_the_trial_goes_first(
    chains: list[list[float]], prefill: int, cap: int, cost: StepCost, data: st.DataObject
) -> None:
    trial = data.draw(st.none() | st.integers(0, len(chains) - 1))
    load = StepLoad(decoding=len(chains), prefill=prefill, cap=cap)
    purchase = buy_chains(chains, load, cost, trial=trial)
    assert sum(purchase.lengths) <= cap
    gain = sum(
        expected_tokens(chain[:length])
        for chain, length in zip(chains, purchase.lengths, strict=True)
    )
    assert purchase.gain == pytest.approx(gain)
    if trial is not None:
        assert purchase.lengths[trial] == min(len(chains[trial]), cap)


@given(st.integers(1, 32), st.integers(1, 6), costs())
def test_drafts_that_never_hold_are_not_bought_even_where_rows_are_free(
    sequences: int, depth: int, cost: StepCost
) -> None:
    load = StepLoad(decoding=sequences, prefill=0, cap=100)
    assert not any(buy_chains([[0.0] * depth] * sequences, load, cost).lengths)


@pytest.mark.parametrize(
    ("sequences", "chance", "bought"),
    [(1, 0.9, 9), (1, 0.1, 1), (8, 0.3, 0), (8, 0.9, 32), (32, 0.5, 0)],
)
def test_on_a_cpu_one_sequence_drafts_deep_and_many_only_what_is_likely(
    sequences: int, chance: float, bought: int
) -> None:
    load = StepLoad(decoding=sequences, prefill=0, cap=400)
    purchase = buy_chains([[chance] * 12] * sequences, load, CPU)
    assert sum(purchase.lengths) == bought


def test_the_sure_sequence_gets_the_rows() -> None:
    load = StepLoad(decoding=3, prefill=0, cap=4)
    assert buy_chains([[0.5] * 4, [0.95] * 4, []], load, CPU).lengths == (0, 4, 0)


def test_a_prefill_in_the_step_makes_rows_as_dear_as_beyond_it() -> None:
    chains = [[0.06] * 4]
    assert buy_chains(chains, StepLoad(decoding=1, prefill=0, cap=8), CPU).lengths == (1,)
    assert buy_chains(chains, StepLoad(decoding=1, prefill=64, cap=8), CPU).lengths == (0,)


def test_without_candidates_nothing_is_bought() -> None:
    purchase = buy_chains([[], []], StepLoad(decoding=2, prefill=0, cap=8), CPU)
    assert (purchase.lengths, purchase.gain) == ((0, 0), 0.0)
