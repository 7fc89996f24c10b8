"""Chances of drafts follow what was verified, and start sensibly where nothing was yet."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from quickchange_server.protocol import LOOKUP
from quickchange_server.spec_decode.acceptance_rates import (
    DEEPEST,
    HOPE,
    KEPT,
    OFFERS,
    STALE,
    Acceptance,
    Drafter,
)

HEADS = Drafter("digest of heads", b"lora")
FOUND = Drafter(LOOKUP, b"lora")

drafters = st.sampled_from([HEADS, FOUND, Drafter("other heads", b""), Drafter(LOOKUP, b"")])
confidences = st.floats(0, 1) | st.integers(1, 9)


def feed(acceptance: Acceptance, drafter: Drafter, held: float, times: int, seed: int = 0) -> None:
    """`times` verifications of drafts at depth 1, of which `held` hold."""
    chance = random.Random(seed)
    confidence = 3 if drafter.name == LOOKUP else 0.6
    for _ in range(times):
        acceptance.observe(drafter, 1, confidence, chance.random() < held)


@given(
    st.lists(st.tuples(drafters, st.integers(1, 20), st.integers(1, 9), st.booleans())),
    drafters,
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_a_chance_is_always_between_never_and_always(
    observed: list[tuple[Drafter, int, int, bool]], drafter: Drafter, depth: int, confidence: int
) -> None:
    acceptance = Acceptance()
    for who, at, sure, held in observed:
        acceptance.observe(who, at, sure if who.name == LOOKUP else sure / 9, held)
    sure_now = confidence if drafter.name == LOOKUP else confidence / 9
    assert 0 < acceptance.chance(drafter, depth, sure_now) < 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.integers(0, 1_000), drafters)
def test_follows_a_rate_that_shifts(
    first: float, second: float, seed: int, drafter: Drafter
) -> None:
    acceptance = Acceptance()
    confidence = 3 if drafter.name == LOOKUP else 0.6
    for rate in (first, second):
        feed(acceptance, drafter, rate, 3_000, seed)
        assert acceptance.chance(drafter, 1, confidence) == pytest.approx(rate, abs=0.06)


def test_thousands_of_half_lives_lose_no_precision() -> None:
    acceptance = Acceptance()
    feed(acceptance, HEADS, 1.0, 40_000)
    feed(acceptance, HEADS, 0.0, 512)
    assert acceptance.chance(HEADS, 1, 0.6) == pytest.approx(0.5, abs=0.02)


def test_new_heads_are_taken_at_their_word_and_new_lookups_by_their_match() -> None:
    acceptance = Acceptance()
    assert acceptance.chance(HEADS, 1, 0.99) > 0.9
    assert acceptance.chance(HEADS, 1, 0.02) < 0.1
    assert acceptance.chance(FOUND, 1, 1) < acceptance.chance(FOUND, 1, 4)
    assert acceptance.chance(FOUND, 1, 8) == acceptance.chance(FOUND, 1, 100)


def test_what_other_adapters_show_is_where_a_new_one_starts() -> None:
    acceptance = Acceptance()
    feed(acceptance, FOUND, 0.95, 500)
    assert acceptance.chance(Drafter(LOOKUP, b"new"), 1, 3) > 0.85
    assert acceptance.chance(HEADS, 1, 0.6) == Acceptance().chance(HEADS, 1, 0.6)


def test_depths_and_confidences_of_a_drafter_are_told_apart() -> None:
    acceptance = Acceptance()
    for _ in range(300):
        acceptance.observe(HEADS, 1, 0.6, True)
        acceptance.observe(HEADS, 2, 0.6, False)
        acceptance.observe(HEADS, 2, 0.99, True)
    assert acceptance.chance(HEADS, 1, 0.6) > 0.9
    assert acceptance.chance(HEADS, 2, 0.6) < 0.1
    assert acceptance.chance(HEADS, 2, 0.99) > 0.9


def test_what_is_no_longer_observed_gives_way_to_what_is() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe(HEADS, 4, 0.6, False)
    assert acceptance.chance(HEADS, 4, 0.6) < 0.2
    for _ in range(4_000):
        acceptance.observe(HEADS, 1, 0.6, True)
    assert acceptance.chance(HEADS, 4, 0.6) > 0.8


def test_only_the_latest_drafters_are_remembered() -> None:
    acceptance = Acceptance()
    start = acceptance.chance(Drafter("forgotten", b""), 1, 0.6)
    feed(acceptance, Drafter("forgotten", b""), 0.0, 50)
    for index in range(KEPT):
        feed(acceptance, Drafter(f"heads {index}", b""), 1.0, 1)
    assert acceptance.chance(Drafter("forgotten", b""), 1, 0.6) > start


def test_what_was_not_offered_yet_is_hoped_for() -> None:
    acceptance = Acceptance()
    assert (acceptance.expected(HEADS, DEEPEST) == HOPE).all()
    acceptance.offered(HEADS, [0.3, 0.6])
    expected = acceptance.expected(HEADS, 3)
    assert expected.shape == (OFFERS, 3)
    known = [acceptance.chance(HEADS, 1, 0.3), acceptance.chance(HEADS, 2, 0.6)]
    assert list(expected[0]) == [*known, HOPE]
    assert (expected[1:] == HOPE).all()


def test_the_last_offers_are_expected_again_with_the_chances_of_now() -> None:
    acceptance = Acceptance()
    for index in range(OFFERS + 1):
        acceptance.offered(HEADS, [0.6 if index else 0.01])
    feed(acceptance, HEADS, 1.0, 500)
    assert acceptance.expected(HEADS, 1).ravel() == pytest.approx(acceptance.chance(HEADS, 1, 0.6))


def test_nothing_is_expected_behind_the_end_of_a_text() -> None:
    acceptance = Acceptance()
    acceptance.offered(HEADS, [0.6], ends=True)
    assert list(acceptance.expected(HEADS, 3)[0]) == [acceptance.chance(HEADS, 1, 0.6), 0.0, 0.0]


def test_chances_follow_what_is_observed_within_a_few_observations() -> None:
    acceptance = Acceptance()
    feed(acceptance, HEADS, 1.0, 500)
    before = acceptance.chance(HEADS, 1, 0.6)
    feed(acceptance, HEADS, 0.0, STALE + 1)
    assert acceptance.chance(HEADS, 1, 0.6) < before
