"""Prompt lookup finds what a search over all places finds, whenever it is asked."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from quickchange_server.spec_decode.prompt_lookup import LONGEST, WALKED, LookupMatch, PromptLookup

few_tokens = st.lists(st.integers(0, 3), max_size=40)


def naive(tokens: Sequence[int], most: int, after: Sequence[int]) -> LookupMatch | None:
    """Every earlier place compared with the end of the sequence and its drafts."""
    stream = [*tokens, *after]
    best, longest = 0, 0
    for place in range(len(tokens) - 2, -1, -1):  # of equals, the latest wins
        match = 0
        while match < min(LONGEST, place + 1) and stream[place - match] == stream[-1 - match]:
            match += 1
        if match > longest:
            best, longest = place, match
    if not longest or most < 1:
        return None
    found = list(stream)
    for offset in range(most):
        found.append(found[best + 1 + offset])
    return LookupMatch(tuple(found[len(stream) :]), longest)


@given(few_tokens, few_tokens, st.integers(0, 12), st.lists(st.integers(0, 3), max_size=5))
def test_finds_what_a_search_over_all_places_finds(
    prompt: list[int], output: list[int], most: int, after: list[int]
) -> None:
    tokens = list(prompt)
    lookup = PromptLookup(tokens)
    assert lookup.find(most, after) == naive(tokens, most, after)
    for token in output:
        tokens.append(token)
        assert lookup.find(most, after) == naive(tokens, most, after)


@given(few_tokens, st.integers(0, 40))
def test_asking_on_the_way_changes_nothing(tokens: list[int], asked_at: int) -> None:
    growing = tokens[:asked_at]
    asked = PromptLookup(growing)
    asked.find(4)
    growing += tokens[asked_at:]
    assert asked.find(4) == PromptLookup(tokens).find(4)


@pytest.mark.parametrize("tokens", [[], [7], [7, 8], [1, 2, 3, 4]])
def test_nothing_comes_of_tokens_never_seen_before(tokens: list[int]) -> None:
    assert PromptLookup(tokens).find(4) is None


def test_the_longer_match_goes_before_the_later() -> None:
    tokens = [1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3]
    assert PromptLookup(tokens).find(1) == LookupMatch((40,), 3)


def test_a_period_goes_on_as_long_as_wanted() -> None:
    assert PromptLookup([5, 6, 7, 5, 6, 7, 5]).find(7) == LookupMatch((6, 7, 5, 6, 7, 5, 6), 4)


def test_drafts_of_another_drafter_are_followed_by_what_followed_them() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9]
    assert PromptLookup(tokens).find(2, after=(1, 2, 3)) == LookupMatch((4, 5), 3)


def test_places_beyond_the_walk_are_left_aside() -> None:
    far = [8, 1, 2, 100]
    near = [token for _ in range(WALKED) for token in (9, 1, 2, 50)]
    assert PromptLookup([*far, *near, 8, 1, 2]).find(1) == LookupMatch((50,), 2)
    assert PromptLookup([*far, *near[4:], 8, 1, 2]).find(1) == LookupMatch((100,), 3)
