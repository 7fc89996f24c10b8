"""Prompts and lengths of a load."""

from __future__ import annotations

import random

import pytest

from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.workload import (
    WORDS,
    Fixed,
    LogNormal,
    Uniform,
    Workload,
    make_prompt,
    parse_length,
)


def workload(seed: int = 0) -> Workload:
    return Workload(Uniform(8, 64), LogNormal(32, 0.5), Popularity("zipf", 8, seed), seed)


def test_requests_depend_on_seed_and_index_alone() -> None:
    assert list(workload().requests(5, 20)) == [workload().request(i) for i in range(5, 25)]
    assert workload(1).request(0).prompt != workload(2).request(0).prompt


def test_neighbouring_prompts_differ_in_their_first_word() -> None:
    first = [make_prompt(0, i, 16).split()[0] for i in range(1000, 1000 + len(WORDS))]
    assert len(set(first)) == len(WORDS)


def test_prompts_far_apart_differ_too() -> None:
    prompts = {make_prompt(0, i * len(WORDS), 16) for i in range(200)}
    assert len(prompts) == 200


@pytest.mark.parametrize("tokens", [1, 2, 64, 500])
def test_a_prompt_has_a_word_for_each_token(tokens: int) -> None:
    assert len(make_prompt(0, 0, tokens).split()) == tokens


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS)


def test_without_popularity_requests_are_for_the_base_model() -> None:
    assert Workload(Fixed(4), Fixed(4)).request(0).adapter is None


def test_length_distributions_keep_their_bounds() -> None:
    rng = random.Random(0)
    assert {Fixed(7).draw(rng) for _ in range(10)} == {7}
    uniform = [Uniform(3, 5).draw(rng) for _ in range(200)]
    assert set(uniform) == {3, 4, 5}
    lognormal = sorted(LogNormal(100, 1.0).draw(rng) for _ in range(2001))
    assert lognormal[0] >= 1
    assert lognormal[-1] <= 800
    assert lognormal[1000] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("64", Fixed(64)),
        ("uniform:3:9", Uniform(3, 9)),
        ("lognormal:64:0.5", LogNormal(64, 0.5)),
    ],
)
def test_lengths_are_parsed(text: str, length: object) -> None:
    assert parse_length(text) == length


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "many", "uniform:9:3", "uniform:0:3", "uniform:4", "lognormal:8"]
)
def test_a_bad_length_is_refused_with_the_forms_that_are_not(text: str) -> None:
    with pytest.raises(ValueError, match="uniform:LOW:HIGH"):
        parse_length(text)
