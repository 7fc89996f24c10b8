"""Splits of attention: how many programs a sequence has, and what its partial results take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from quickchange_kernels.attention.paged_attention_tuning import (
    MAX_SPLIT_QUERIES,
    SPLIT_GRAIN,
    launches_for,
    programs_along,
    scratch_bytes,
    seen_keys,
    splits_for,
    tilings,
)
from quickchange_kernels.gpu_targets import TARGETS

MIB = 2**20
targets = st.sampled_from(sorted(TARGETS))
widths = st.integers(1, 600)


@pytest.mark.parametrize("kv_heads", [2, 3, 4, 5, 8, 16, 32, 128])
@pytest.mark.parametrize("keys", [4096, 32768, 131072])
def test_one_sequence_of_4096_keys_fills_a_gpu_whatever_its_table_has_room_for(
    kv_heads: int, keys: int
) -> None:
    splits = splits_for(kv_heads)
    length = max(splits.keys, -(-keys // splits.most))
    assert -(-keys // length) * kv_heads >= 128
    assert programs_along(kv_heads, splits.reached(131072)) == splits.reached(131072)


@given(kv_heads=st.integers(1, 256), queries=st.integers(1, MAX_SPLIT_QUERIES))
def test_a_sequence_has_room_for_all_its_partial_results(kv_heads: int, queries: int) -> None:
    splits = splits_for(kv_heads)
    count = max(1, min(splits.most, splits.room // queries))  # as the kernel cuts
    assert queries * count <= min(queries * splits.most, splits.room)
    assert splits.keys % SPLIT_GRAIN == 0


def test_scratch_is_bounded_by_sequences_not_by_rows() -> None:
    """Llama 8B with 131,072 positions; today's would be 1,073 MB at 2,048 rows."""
    prefill = scratch_bytes(2048, 64, 32, 8, 128, 131072)
    assert prefill == 64 * 128 * 32 * 130 * 4  # 136 MB: 128 partial results a sequence
    assert scratch_bytes(2048, 1, 32, 8, 128, 131072) == prefill // 64
    assert scratch_bytes(64, 64, 32, 8, 128, 131072) == prefill // 4  # one query each: 32 splits
    assert scratch_bytes(64, 64, 32, 8, 128, 1024) == prefill // 32  # of which 4 are reached


@given(capacity=st.integers(1, 2**20), window=st.integers(1, 2**17), count=st.integers(1, 64))
def test_a_window_bounds_the_keys_that_are_split(capacity: int, window: int, count: int) -> None:
    length = capacity
    first = max(length - count - window + 1, 0) // SPLIT_GRAIN * SPLIT_GRAIN
    assert length - first <= seen_keys(capacity, window) <= capacity


@given(
    T=st.integers(1, 5000), B=st.integers(1, 300), group=st.integers(1, 80), dim=widths,
    value_dim=widths, itemsize=st.sampled_from([2, 4]), target=targets,
)  # fmt: skip
def test_launches_take_their_tiles_from_the_shape_alone(
    T: int, B: int, group: int, dim: int, value_dim: int, itemsize: int, target: str
) -> None:
    shape = (group, dim, value_dim, itemsize, TARGETS[target])
    launches = launches_for(T, B, *shape)
    assert {repr(launch.tiling) for launch in launches} <= {repr(one) for one in tilings(*shape)}
    reach = [launch.most for launch in launches]
    assert [launch.least for launch in launches] == [1, *(most + 1 for most in reach[:-1])]
    assert reach[-1] >= T
    assert all(launch.tiling.rows >= group for launch in launches)
