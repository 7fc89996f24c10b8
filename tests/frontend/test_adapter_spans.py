"""Spans of adapters: sums in one form, and where activated ones begin."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.frontend.adapter_spans import activated, last_place, summed
from quickchange_server.protocol import Component

END = 12  # no drawn span begins behind it
PROMPTS = st.lists(st.integers(0, 2), max_size=30)


@st.composite
def terms(draw: st.DrawFn) -> Component:
    begin = draw(st.integers(0, END - 1))
    end = draw(st.none() | st.integers(begin + 1, END))
    return Component(
        draw(st.sampled_from("ab")), draw(st.sampled_from([1.0, -1.0, 0.5])), begin, end
    )


def weights(components: list[Component], position: int) -> dict[str, float]:
    """The sum of each adapter's weights at a position, where it is not 0."""
    found: dict[str, float] = {}
    for component in components:
        if component.begin <= position and (component.end is None or position < component.end):
            found[component.digest] = found.get(component.digest, 0.0) + component.weight
    return {digest: weight for digest, weight in found.items() if weight}


@given(st.lists(terms(), max_size=6))
def test_a_sum_has_the_same_weights_at_every_position(given: list[Component]) -> None:
    for position in range(END + 2):
        assert weights(list(summed(given)), position) == weights(given, position)


@given(st.lists(terms(), max_size=6))
def test_terms_of_one_adapter_are_apart_in_order_and_never_nothing(given: list[Component]) -> None:
    found = summed(given)
    assert list(found) == sorted(found, key=lambda c: (c.digest, c.begin))
    for one, after in pairwise(found):
        if one.digest == after.digest:
            assert one.end is not None
            assert one.end < after.begin or (one.end, one.weight) != (after.begin, after.weight)
            assert one.end <= after.begin
    assert all(component.weight for component in found)


@given(st.lists(terms(), max_size=6), st.integers(0, END))
def test_equal_sums_have_one_form(given: list[Component], at: int) -> None:
    cut = []
    for term in given:
        if term.begin < at and (term.end is None or at < term.end):
            cut += [
                Component(term.digest, term.weight, at, term.end),
                Component(term.digest, term.weight, term.begin, at),
            ]
        else:
            cut.append(term)
    assert summed(cut) == summed(given)


@given(PROMPTS, st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_the_last_place_of_tokens_is_found(prompt: list[int], tokens: list[int]) -> None:
    places = [i for i in range(len(prompt)) if prompt[i : i + len(tokens)] == tokens]
    assert last_place(tuple(tokens), tuple(prompt)) == (places[-1] if places else None)


def test_a_search_takes_time_in_proportion_whatever_is_searched() -> None:
    prompt, tokens = (1,) * 200_000, (2,) + (1,) * 4_000
    assert last_place(tokens, prompt) is None


@pytest.mark.parametrize(
    ("component", "prompt", "expected"),
    [
        (Component("a"), [1, 8, 9, 2], [Component("a", 1.0, 1)]),
        (Component("a", 0.5, 3), [1, 8, 9, 2], [Component("a", 0.5, 3)]),
        (Component("a", 0.5, 0, 2), [1, 8, 9, 2], [Component("a", 0.5, 1, 2)]),
        (Component("a", 0.5, 0, 1), [1, 8, 9, 2], []),
        (Component("a"), [1, 8, 2, 9], []),
        (Component("a"), [8, 9, 8, 9, 1], [Component("a", 1.0, 2)]),
        (Component("b"), [1, 2], [Component("b")]),
    ],
)
def test_an_activated_adapter_begins_at_its_last_invocation(
    component: Component, prompt: list[int], expected: list[Component]
) -> None:
    assert list(activated([component], {"a": (8, 9)}, prompt)) == expected
