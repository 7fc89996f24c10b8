"""Keys of blocks tell what their rows were computed under, and nothing of what comes behind."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.protocol import Component, SamplingParams, Submit

BLOCK, BLOCKS = 4, 5
LENGTH = BLOCK * BLOCKS


@st.composite
def components(draw: st.DrawFn) -> tuple[Component, ...]:
    """At most one term of each adapter."""
    found = []
    for digest in draw(st.sets(st.sampled_from("ab"))):
        begin = draw(st.integers(0, LENGTH + 2))
        end = draw(st.none() | st.integers(begin + 1, LENGTH + 3))
        found.append(Component(digest, draw(st.sampled_from([1.0, 0.5])), begin, end))
    return tuple(sorted(found, key=lambda c: c.digest))


def keys(adapters: tuple[Component, ...], salt: str = "") -> list[bytes]:
    submit = Submit("r", tuple(range(LENGTH)), SamplingParams(), adapters, salt=salt, seed=0)
    return Sequence(submit, 0.0).keys_of_full_blocks(BLOCKS, BLOCK)


def rows(adapters: tuple[Component, ...], count: int) -> list[set[tuple[str, float]]]:
    """What each of the first rows takes."""
    return [
        {
            (c.digest, c.weight)
            for c in adapters
            if c.begin <= position and (c.end is None or position < c.end)
        }
        for position in range(count)
    ]


@given(components(), components())
def test_two_texts_share_a_block_exactly_where_all_rows_so_far_take_the_same(
    one: tuple[Component, ...], other: tuple[Component, ...]
) -> None:
    for block, (mine, its) in enumerate(zip(keys(one), keys(other), strict=True)):
        count = BLOCK * (block + 1)
        assert (mine == its) == (rows(one, count) == rows(other, count))


@given(components())
def test_no_block_is_shared_with_another_salt(adapters: tuple[Component, ...]) -> None:
    assert not set(keys(adapters)) & set(keys(adapters, "other"))


def test_requests_of_one_adapter_wait_in_one_queue_wherever_it_begins() -> None:
    made = [
        Sequence(Submit("r", (1, 2, 3), SamplingParams(), (term,), seed=0), 0.0).key
        for term in (Component("a"), Component("a", 1.0, 2), Component("a", 1.0, 0, 1))
    ]
    assert len(set(made)) == 1
