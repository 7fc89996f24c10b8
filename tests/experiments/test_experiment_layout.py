"""The line's division: right shares, and never more movement than the shares' distance."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.experiments.layout import SIZE, Layout, divided, moved, owner, shares

NAMES = ("a", "b", "c", "d")
weights_of_all = st.fixed_dictionaries(
    {name: st.one_of(st.just(0.0), st.floats(1e-3, 1e3)) for name in NAMES}
).filter(lambda weights: any(weights.values()))


def changed_hands(before: Layout, after: Layout) -> dict[tuple[str, str], int]:
    """Points by who lost and who got them."""
    cuts = sorted({0, *(end for end, _ in before), *(end for end, _ in after)})
    moves: dict[tuple[str, str], int] = {}
    for start, end in pairwise(cuts):
        pair = owner(before, start), owner(after, start)
        moves[pair] = moves.get(pair, 0) + end - start
    return {(lost, got): size for (lost, got), size in moves.items() if lost != got}


@given(weights_of_all)
def test_shares_are_the_weights_to_the_point(weights: dict[str, float]) -> None:
    sizes = shares(divided(weights))
    total = sum(weights.values())
    assert sum(sizes.values()) == SIZE
    for name, weight in weights.items():
        assert abs(sizes.get(name, 0) - weight / total * SIZE) <= len(NAMES)
        assert (name in sizes) <= (weight > 0)


@given(weights_of_all, st.lists(weights_of_all, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_what_moves_is_exactly_the_distance_of_the_shares(
    first: dict[str, float], later: list[dict[str, float]]
) -> None:
    history = [divided(first)]
    for weights in later:
        layout, after = history[-1], moved(history, weights)
        old, new = shares(layout), shares(after)
        assert new == shares(divided(weights))
        moves = changed_hands(layout, after)
        distance = sum(abs(old.get(n, 0) - new.get(n, 0)) for n in NAMES)
        assert 2 * sum(moves.values()) == distance
        kept = {name for name in NAMES if old.get(name, 0) == new.get(name, 0)}
        assert not any({lost, got} & kept for lost, got in moves)
        history.append(after)


@given(weights_of_all, weights_of_all, weights_of_all)
def test_weights_that_are_taken_back_give_everybody_back_what_they_had(
    first: dict[str, float], second: dict[str, float], third: dict[str, float]
) -> None:
    history = [divided(first)]
    for weights in (second, third, second, first):
        history.append(moved(history, weights))
    assert history[3:] == [history[1], history[0]]


def test_a_new_variant_takes_from_each_only_what_it_must_give() -> None:
    before = divided({"a": 1, "b": 1})
    moves = changed_hands(before, moved([before], {"a": 2, "b": 2, "c": 1}))
    assert set(moves) == {("a", "c"), ("b", "c")}
