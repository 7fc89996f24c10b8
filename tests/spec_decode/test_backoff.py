"""Drafting that has not paid rests, longer each time, in batches of its size alone."""

from __future__ import annotations

import numpy as np

from quickchange_server.spec_decode.acceptance_rates import Drafter
from quickchange_server.spec_decode.backoff import (
    FEWEST,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MOST,
    RETRY,
    SPACING,
    Backoff,
)

HEADS = Drafter("heads", b"")


def run(backoff: Backoff, steps: int, *, decoding: int, tokens: int, seconds: float) -> int:
    """Steps in which drafting was allowed, where plain steps take a second."""
    allowed = 0
    for _ in range(steps):
        if backoff.awake(decoding):
            allowed += 1
            backoff.observe(decoding, tokens, seconds, 1.0)
    return allowed


def test_drafting_that_pays_never_rests() -> None:
    assert run(Backoff(), 2_000, decoding=8, tokens=12, seconds=1.4) == 2_000


def test_drafting_that_does_not_pay_takes_an_ever_smaller_share_of_the_steps() -> None:
    backoff = Backoff()
    first = run(backoff, MOST + FIRST_PAUSE, decoding=8, tokens=12, seconds=1.6)
    assert first <= MOST + 1
    later = run(backoff, 20_000, decoding=8, tokens=12, seconds=1.6)
    assert later < 0.04 * 20_000


def test_of_many_sequences_fewer_steps_are_enough() -> None:
    assert run(Backoff(), MOST, decoding=32, tokens=40, seconds=1.6) == FEWEST


def test_it_is_taken_up_again_when_it_has_come_to_pay() -> None:
    backoff = Backoff()
    run(backoff, 5_000, decoding=8, tokens=8, seconds=1.1)
    run(backoff, LONGEST_PAUSE + MOST, decoding=8, tokens=16, seconds=1.1)
    assert run(backoff, 500, decoding=8, tokens=16, seconds=1.1) == 500


def test_a_full_batch_says_nothing_of_a_single_sequence() -> None:
    backoff = Backoff()
    run(backoff, 1_000, decoding=32, tokens=32, seconds=1.2)
    assert backoff.awake(1)


def trials(backoff: Backoff, steps: int, drafters: list[Drafter], *, holds: bool) -> list[int]:
    """Steps in which one is tried; its trial's drafts hold in the step after, or do not."""
    tried = []
    for step in range(steps):
        backoff.awake(1)
        if tried and tried[-1] == step - 1 and holds:
            backoff.held(drafters[0])
        if backoff.due(drafters) is not None:
            tried.append(step)
    return tried


def test_a_drafter_whose_drafts_never_hold_is_tried_at_a_fixed_pace() -> None:
    assert set(np.diff(trials(Backoff(), 2_000, [HEADS], holds=False))) == {RETRY}


def test_a_trial_that_holds_is_followed_by_another_soon() -> None:
    assert set(np.diff(trials(Backoff(), 1_000, [HEADS], holds=True))) == {SPACING + 1}


def test_a_drafter_whose_drafts_hold_is_not_tried_until_they_no_longer_do() -> None:
    backoff = Backoff()
    for _ in range(1_000):
        backoff.awake(1)
        backoff.held(HEADS)
        assert backoff.due([HEADS]) is None
    assert trials(backoff, 2 * RETRY, [HEADS], holds=False)[0] == RETRY - 1


def test_a_rest_counts_towards_the_next_trial() -> None:
    backoff = Backoff()
    backoff.due([HEADS])
    for _ in range(RETRY):
        backoff.awake(1)
    assert backoff.due([HEADS]) == HEADS


def test_trials_of_many_drafters_are_spread_over_steps() -> None:
    backoff, many = Backoff(), [Drafter(f"heads {index}", b"") for index in range(64)]
    tried = {}
    for step in range(2_000):
        backoff.awake(1)
        if (drafter := backoff.due(many)) is not None:
            tried[step] = drafter
    assert min(np.diff(list(tried))) >= SPACING
    assert set(tried.values()) == set(many)
