"""Adapter popularity: which request is for which adapter."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_bench.load.popularity import POPULARITIES, Popularity, PopularityName, weights

DRAWS = 4000


def counts(name: PopularityName, adapters: int) -> Counter[int]:
    popularity = Popularity(name, adapters, seed=3)
    return Counter(popularity.adapter(request) for request in range(DRAWS))


@given(st.sampled_from(POPULARITIES), st.integers(1, 600))
def test_weights_are_probabilities(name: PopularityName, adapters: int) -> None:
    found = weights(name, adapters)
    assert len(found) == adapters
    assert all(weight >= 0 for weight in found)
    assert sum(found) == pytest.approx(1)


@given(st.sampled_from(POPULARITIES), st.integers(1, 600), st.integers(0, 10**9))
def test_an_adapter_is_always_in_range(name: PopularityName, adapters: int, request: int) -> None:
    assert 0 <= Popularity(name, adapters, seed=1).adapter(request) < adapters


@pytest.mark.parametrize("name", POPULARITIES)
def test_a_choice_depends_on_seed_and_request_alone(name: PopularityName) -> None:
    forwards = [Popularity(name, 8, seed=5).adapter(i) for i in range(100)]
    shared = Popularity(name, 8, seed=5)
    backwards = [shared.adapter(i) for i in reversed(range(100))]
    assert forwards == backwards[::-1]


def test_identical_takes_one_adapter() -> None:
    assert set(counts("identical", 8)) == {0}


def test_distinct_takes_each_in_turn() -> None:
    popularity = Popularity("distinct", 8)
    assert [popularity.adapter(i) for i in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


@pytest.mark.parametrize("name", ["uniform", "zipf", "skewed"])
def test_draws_follow_the_weights(name: PopularityName) -> None:
    found = counts(name, 10)
    for adapter, weight in enumerate(weights(name, 10)):
        assert found[adapter] / DRAWS == pytest.approx(weight, abs=0.03)


def test_zipf_halves_from_the_first_to_the_second() -> None:
    first, second, *_ = weights("zipf", 100)
    assert first == pytest.approx(2 * second)


def test_skewed_gives_a_fifth_of_the_adapters_four_fifths_of_the_requests() -> None:
    assert sum(weights("skewed", 100)[:20]) == pytest.approx(0.8)


def test_seeds_differ() -> None:
    first, second = (Popularity("uniform", 50, seed) for seed in (0, 1))
    assert [first.adapter(i) for i in range(50)] != [second.adapter(i) for i in range(50)]


def test_no_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        Popularity("uniform", 0)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="identical, distinct, uniform, zipf, skewed"):
        Popularity("normal", 3)  # type: ignore[arg-type]
