"""Heads draft only as deep as drafting, rows included, is likely to pay."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from quickchange_server.spec_decode.acceptance_rates import DEEPEST, OFFERS, Acceptance, Drafter
from quickchange_server.spec_decode.cost_model import DraftCost, StepCost
from quickchange_server.spec_decode.draft_depth import REPLAN, SETTLED, DepthPlan, Prospect
from quickchange_server.spec_decode.draft_selection import StepLoad

CPU = StepCost([(1, 0.021), (8, 0.026), (16, 0.040), (32, 0.062)])
GOOD, BAD = Drafter("good", b""), Drafter("bad", b"")


def learned(**held: float) -> Acceptance:
    """Drafters that have long offered chains of 5 of which each draft holds so often."""
    acceptance = Acceptance()
    for name, rate in held.items():
        drafter = Drafter(name, b"")
        for _ in range(OFFERS):
            acceptance.offered(drafter, [0.6] * 5)
        for index in range(1_500):
            for depth in range(1, 6):
                acceptance.observe(drafter, depth, 0.6, (index * rate) % 1 >= 1 - rate)
    return acceptance


def drafting(a_pass: float, a_draft: float) -> DraftCost:
    cost = DraftCost()
    for deep in ([1], [5], [1] * 8, [5] * 8, [2] * 16) * 20:
        cost.observe(deep, a_pass * max(deep) + a_draft * sum(deep))
    return cost


def load(decoding: int) -> StepLoad:
    return StepLoad(decoding=decoding, prefill=0, cap=160)


def depths(
    prospects: list[Prospect],
    acceptance: Acceptance,
    load: StepLoad,
    cost: StepCost,
    draft: DraftCost,
) -> tuple[int, ...]:
    return DepthPlan(acceptance, cost, draft).depths(prospects, load)


CHEAP = drafting(0.0002, 0.00002)
DEAR = drafting(0.004, 0.0005)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.builds(
            Prospect,
            st.lists(st.floats(0, 1), max_size=6),
            st.sampled_from([None, GOOD, BAD]),
            st.integers(0, DEEPEST + 4),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 100),
    st.integers(0, 30),
)
def test_no_sequence_drafts_deeper_than_it_may(
    prospects: list[Prospect], prefill: int, cap: int
) -> None:
    found = depths(
        prospects,
        learned(good=0.9, bad=0.1),
        StepLoad(decoding=len(prospects), prefill=prefill, cap=cap),
        CPU,
        CHEAP,
    )
    assert len(found) == len(prospects)
    for depth, prospect in zip(found, prospects, strict=True):
        assert 0 <= depth <= (prospect.deepest if prospect.drafter else 0)
    assert cap or not any(found)


def test_a_single_sequence_drafts_to_the_end_where_drafts_hold() -> None:
    assert depths([Prospect((), GOOD, 5)], learned(good=0.9), load(1), CPU, CHEAP) == (5,)


def test_under_load_drafts_that_seldom_hold_are_not_made() -> None:
    found = depths([Prospect((), BAD, 5)] * 16, learned(bad=0.2), load(16), CPU, CHEAP)
    assert found == (0,) * 16


def test_drafting_that_takes_too_long_is_left() -> None:
    acceptance = learned(good=0.3)
    assert depths([Prospect((), GOOD, 5)], acceptance, load(1), CPU, CHEAP) != (0,)
    assert depths([Prospect((), GOOD, 5)], acceptance, load(1), CPU, DEAR) == (0,)


def test_each_drafter_of_a_batch_has_its_own_depth() -> None:
    prospects = [Prospect((), GOOD, 5), Prospect((), BAD, 5), Prospect((), None, 0)] * 3
    found = depths(prospects, learned(good=0.95, bad=0.02), load(9), CPU, CHEAP)
    assert found == (5, 0, 0) * 3


def test_what_is_known_without_heads_spares_them() -> None:
    prospects = [Prospect([0.98] * 5, GOOD, 5), Prospect([0.1], GOOD, 5)]
    assert depths(prospects, learned(good=0.9), load(2), CPU, CHEAP) == (0, 5)


def test_new_heads_are_tried_at_once() -> None:
    new = Drafter("never seen", b"")
    assert depths([Prospect((), new, 4)], Acceptance(), load(1), CPU, CHEAP) == (4,)


@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_without_heads_there_is_nothing_to_decide(sequences: int) -> None:
    found = depths([Prospect([0.9] * 3)] * sequences, Acceptance(), load(sequences), CPU, CHEAP)
    assert found == (0,) * sequences


def test_a_plan_follows_what_drafts_come_to_within_a_few_steps() -> None:
    acceptance = learned(good=0.9)
    plan = DepthPlan(acceptance, CPU, CHEAP)
    prospects = [Prospect((), GOOD, 5)] * 16
    assert all(plan.depths(prospects, load(16)))
    for _ in range(3_000):
        acceptance.observe(GOOD, 1, 0.6, False)
    found = [plan.depths(prospects, load(16)) for _ in range(REPLAN)]
    assert found[-1] == (0,) * 16


def test_a_plan_is_made_anew_when_the_batch_changes() -> None:
    plan = DepthPlan(learned(good=0.3), CPU, CHEAP)
    assert plan.depths([Prospect((), GOOD, 5)], load(1)) != (0,)
    assert plan.depths([Prospect((), GOOD, 5)] * 16, load(16)) == (0,) * 16
    assert plan.depths([Prospect((), GOOD, 5)], load(1)) != (0,)


def test_later_plans_hold_longer() -> None:
    acceptance = learned(good=0.9)
    plan = DepthPlan(acceptance, CPU, CHEAP)
    prospects = [Prospect((), GOOD, 5)] * 16
    for _ in range(SETTLED * SETTLED):
        plan.depths(prospects, load(16))
    for _ in range(3_000):
        acceptance.observe(GOOD, 1, 0.6, False)
    found = [plan.depths(prospects, load(16))[0] for _ in range(2 * SETTLED)]
    first = found.index(0)
    assert 0 < first <= SETTLED
    assert not any(found[first:])
