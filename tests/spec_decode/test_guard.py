"""Drafting that has not paid rests, longer each time, in batches of its size alone."""

from __future__ import annotations

from quickchange_server.spec_decode.backoff import ENOUGH, FIRST_PAUSE, LONGEST_PAUSE, Guard


def run(guard: Guard, steps: int, *, decoding: int, tokens: int, seconds: float) -> int:
    """Steps in which drafting was allowed, where plain steps take a second."""
    allowed = 0
    for _ in range(steps):
        if guard.awake(decoding):
            allowed += 1
            guard.observe(decoding, tokens, seconds, 1.0)
    return allowed


def test_drafting_that_pays_never_rests() -> None:
    assert run(Guard(), 2_000, decoding=8, tokens=12, seconds=1.4) == 2_000


def test_drafting_that_does_not_pay_takes_an_ever_smaller_share_of_the_steps() -> None:
    guard = Guard()
    first = run(guard, ENOUGH + FIRST_PAUSE, decoding=8, tokens=12, seconds=1.6)
    assert first <= ENOUGH + 1
    later = run(guard, 20_000, decoding=8, tokens=12, seconds=1.6)
    assert later < 0.04 * 20_000


def test_it_is_taken_up_again_when_it_has_come_to_pay() -> None:
    guard = Guard()
    run(guard, 5_000, decoding=8, tokens=8, seconds=1.1)
    run(guard, LONGEST_PAUSE + ENOUGH, decoding=8, tokens=16, seconds=1.1)
    assert run(guard, 500, decoding=8, tokens=16, seconds=1.1) == 500


def test_a_full_batch_says_nothing_of_a_single_sequence() -> None:
    guard = Guard()
    run(guard, 1_000, decoding=32, tokens=32, seconds=1.2)
    assert guard.awake(1)
