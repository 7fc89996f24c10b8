"""The uniform numbers behind sampling, against NumPy's Philox and a chi-square test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_kernels.sampling.philox import (
    philox_keys,
    philox_word,
    plain_philox_uniform,
    uniform,
    uniforms,
)

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(1, 2**40)


@settings(deadline=None)
@given(SEEDS, POSITIONS)
def test_words_equal_numpys_philox_at_the_same_key_and_counter(seed: int, position: int) -> None:
    # NumPy steps its counter before the first word.
    reference = np.random.Philox(key=seed, counter=position - 1)
    assert philox_word(seed, position) == reference.random_raw()


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2**40))
def test_uniform_is_a_pure_function_in_the_unit_interval(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert uniform(seed, position) == value


def test_a_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


@pytest.mark.parametrize("axis", ["positions of one seed", "seeds at one position"])
def test_uniform_fills_the_unit_interval_evenly(axis: str) -> None:
    bins, count = 50, 10_000
    values = [
        uniform(7, i) if axis.startswith("positions") else uniform(i, 7) for i in range(count)
    ]
    observed, _ = np.histogram(values, bins=bins, range=(0.0, 1.0))
    expected = count / bins
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 94.6  # the 0.9999 quantile at 49 degrees of freedom


def test_neighbouring_positions_are_uncorrelated() -> None:
    values = np.array([uniform(3, i) for i in range(10_000)])
    assert abs(float(np.corrcoef(values[:-1], values[1:])[0, 1])) < 0.04  # 4 standard errors


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**62)), max_size=5))
def test_a_batch_of_uniforms_equals_them_one_by_one(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
    expected = [uniform(seed, position) for seed, position in pairs]
    found = uniforms(philox_keys(seeds), np.array(positions, dtype=np.int64))
    assert found.tolist() == expected
    bits = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64).view(np.int64)
    plain = plain_philox_uniform(torch.from_numpy(bits), torch.tensor(positions, dtype=torch.int64))
    assert plain.tolist() == expected
