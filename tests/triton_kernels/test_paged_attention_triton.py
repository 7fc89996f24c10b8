"""paged_attention's Triton kernels against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from random_batches import query_starts
from torch import Tensor

from quickchange_kernels.attention import paged_attention_triton, paged_attention_tuning
from quickchange_kernels.attention.paged_attention_contract import (
    paged_attention,
    reference_paged_attention,
)
from quickchange_kernels.attention.paged_attention_tuning import Splits, launches_for
from quickchange_kernels.gpu_targets import TARGETS
from quickchange_kernels.random_inputs import random_keys

Compare = Callable[..., Tensor]


@pytest.fixture
def compare(
    device: torch.device,
    generator: torch.Generator,
    assert_close: Callable[[Tensor, Tensor], None],
    sanitized: Callable[..., AbstractContextManager[None]],
) -> Compare:
    """Attention over random keys against the reference. Dead slots are NaN, dead table entries out
    of range, and each output buffer has to be written."""

    def check(
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        heads: tuple[int, int] = (4, 2),
        dim: int = 64,
        block_size: int = 16,
        window: int = 0,
        softcap: float = 0.0,
        dtype: torch.dtype = torch.float32,
        padding: int = 0,
        value_dim: int | None = None,
        sinks: bool = False,
        slopes: bool = False,
    ) -> Tensor:
        generator.manual_seed(1234)
        keys = random_keys(lengths, heads[1], dim, block_size, generator, dtype, value_dim)
        live = sum(counts)
        q = torch.randn(live + padding, heads[0], dim, generator=generator).to(dtype)
        q[live:] = float("nan")
        cache = (keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens)
        args = (q, *cache, query_starts(counts))
        there = [x.to(device) for x in args]
        by_head = [
            torch.randn(heads[0], generator=generator) * 2 if sinks else None,
            torch.rand(heads[0], generator=generator) if slopes else None,
        ]
        by_head_there = [None if x is None else x.to(device) for x in by_head]
        with sanitized():
            out = paged_attention(*there, dim**-0.5, window, softcap, *by_head_there)
        assert out.shape == (*q.shape[:2], keys.v_cache.shape[3])
        assert out.dtype == dtype
        reference = reference_paged_attention(*args, dim**-0.5, window, softcap, *by_head)
        assert_close(out[:live], reference[:live])
        return out[:live]

    return check


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_decode_around_the_edges_of_blocks_for_every_group(
    compare: Compare, heads: tuple[int, int]
) -> None:
    compare([1, 16, 17, 65], [1, 1, 1, 1], heads=heads)


def test_every_dtype(compare: Compare, dtype: torch.dtype) -> None:
    compare([33, 70], [1, 6], dtype=dtype)


@pytest.mark.parametrize("dim", [8, 72, 80, 96, 128, 256])
def test_every_head_size(compare: Compare, dim: int) -> None:
    compare([5, 70], [1, 20], heads=(2, 1), dim=dim)


@pytest.mark.parametrize(
    "dims", [(24, 16), (20, 33), (192, 128), (576, 512), (7, 5), (64, 128), (512, 512)]
)
def test_values_of_another_width_than_keys(compare: Compare, dims: tuple[int, int]) -> None:
    dim, value_dim = dims
    compare([5, 90, 70], [1, 80, 20], heads=(2, 1), dim=dim, value_dim=value_dim)


@pytest.mark.parametrize(("sinks", "slopes"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 5.0)])
def test_sinks_and_slopes(
    compare: Compare,
    sinks: bool,
    slopes: bool,
    window: int,
    softcap: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one split, in several, and in a chunk over its whole context."""
    switches = {"window": window, "softcap": softcap, "sinks": sinks, "slopes": slopes}
    compare([33, 70], [1, 9], heads=(4, 2), dim=32, **switches)
    monkeypatch.setattr(paged_attention_triton, "splits_for", lambda _: Splits(64, 4, 64))
    compare([130, 1, 90], [1, 1, 70], heads=(6, 2), dim=32, **switches)


@pytest.mark.parametrize("block_size", [5, 16, 64, 128])
def test_every_block_size(compare: Compare, block_size: int) -> None:
    compare([40, 131], [1, 3], heads=(2, 1), block_size=block_size)


@pytest.mark.parametrize("counts", [[0, 0, 7], [1, 0, 20], [30, 1, 0], [0, 66, 1]])
def test_sequences_without_queries_and_chunks_beside_decoding(
    compare: Compare, counts: list[int]
) -> None:
    compare([33, 70, 31], counts, heads=(3, 1))


def test_a_long_chunk_takes_several_tiles(compare: Compare) -> None:
    compare([200, 9], [150, 1], heads=(3, 1), dim=16)


@pytest.mark.parametrize("window", [1, 16, 50, 1000])
@pytest.mark.parametrize("counts", [[1, 1], [1, 9], [70, 1]])
def test_windows(compare: Compare, window: int, counts: list[int]) -> None:
    compare([130, 67], counts, heads=(2, 1), dim=32, window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcaps(compare: Compare, softcap: float) -> None:
    compare([20, 70], [1, 9], heads=(2, 1), softcap=softcap)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("counts", [[2, 16, 5], [1, 1, 7]])
def test_drafts(compare: Compare, heads: tuple[int, int], counts: list[int]) -> None:
    compare([2, 50, 70], counts, heads=heads, dim=32)


def test_as_many_queries_as_splits_take(compare: Compare) -> None:
    compare([100, 64], [64, 3], heads=(2, 1), dim=32)


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_drafts_in_a_window(compare: Compare, window: int) -> None:
    compare([30, 12], [8, 12], heads=(2, 1), dim=32, window=window)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_triton, "splits_for", lambda _: Splits(64, 4, 64))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 70, 12]])
@pytest.mark.parametrize("window", [0, 70])
def test_splits_are_merged(compare: Compare, counts: list[int], window: int) -> None:
    compare([64, 200, 129], counts, heads=(2, 1), dim=32, window=window)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [0, 310])
def test_splits_grow_where_there_would_be_too_many(compare: Compare, window: int) -> None:
    compare([700, 300, 280], [1, 33, 64], heads=(2, 1), dim=16, window=window)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [0, 90])
def test_partial_results_of_mixed_sequences_keep_apart(compare: Compare, window: int) -> None:
    compare([90, 130, 70, 1, 40, 200, 65, 300], [0, 5, 64, 1, 33, 2, 65, 3], dim=16, window=window)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [0, 150])
def test_how_many_programs_share_the_splits_changes_no_bit(
    compare: Compare, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ([300, 64, 129], [1, 7, 20])
    shared = compare(*batch, heads=(4, 2), dim=32, window=window)
    monkeypatch.setattr(paged_attention_tuning, "PROGRAMS", 1)
    assert torch.equal(compare(*batch, heads=(4, 2), dim=32, window=window), shared)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [0, 5, 66])
def test_splits_of_drafts_are_merged(compare: Compare, window: int) -> None:
    """Rows of one tile end in different splits, and may see nothing of the last."""
    compare([130, 70], [10, 8], heads=(2, 1), dim=32, window=window)


@pytest.mark.usefixtures("short_splits")
def test_rows_beyond_the_last_sequence_are_harmless(compare: Compare) -> None:
    compare([70, 30], [1, 5], padding=9)


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 20, 2]])
def test_a_sequence_of_length_0_is_harmless(
    counts: list[int],
    device: torch.device,
    generator: torch.Generator,
    assert_close: Callable[..., None],
) -> None:
    keys = random_keys([30, 5, 40], 1, 32, 16, generator)
    keys.seq_lens[1] = 0
    keys.block_tables[1] = 2**30
    q = torch.randn(sum(counts), 2, 32, generator=generator)
    cache = (keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, query_starts(counts))
    out = paged_attention(q.to(device), *(x.to(device) for x in cache), 0.3)
    owned = torch.ones(len(q), dtype=torch.bool)
    owned[counts[0] : counts[0] + counts[1]] = False
    assert_close(out[owned.to(device)], reference_paged_attention(q, *cache, 0.3)[owned])


def test_blocks_before_the_window_are_never_looked_up(
    device: torch.device, generator: torch.Generator, assert_close: Callable[..., None]
) -> None:
    keys = random_keys([100, 80], 1, 32, 16, generator)
    q = torch.randn(4, 2, 32, generator=generator)
    starts = query_starts([1, 3])
    cache = (keys.k_cache, keys.v_cache)
    expected = reference_paged_attention(
        q, *cache, keys.block_tables, keys.seq_lens, starts, 0.3, 20
    )
    keys.block_tables[0, :5] = 2**30  # the window starts at 80
    keys.block_tables[1, :3] = 2**30  # at 58
    rest = (keys.block_tables, keys.seq_lens, starts)
    out = paged_attention(q.to(device), *(x.to(device) for x in (*cache, *rest)), 0.3, 20)
    assert_close(out, expected)


def test_queries_may_be_a_slice_of_a_fused_projection(
    device: torch.device, generator: torch.Generator, assert_close: Callable[..., None]
) -> None:
    keys = random_keys([20, 50], 2, 32, 16, generator)
    fused = torch.randn(31, 256, generator=generator)
    cache = (keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, query_starts([1, 30]))
    q = fused[:, 64:192].view(31, 4, 32)
    out = paged_attention(
        fused.to(device)[:, 64:192].view(31, 4, 32), *(x.to(device) for x in cache), 0.2
    )
    assert_close(out, reference_paged_attention(q, *cache, 0.2))


@pytest.mark.usefixtures("short_splits")
def test_a_sequences_result_does_not_depend_on_its_batch(
    device: torch.device, generator: torch.Generator
) -> None:
    keys = random_keys([150, 33, 70], 1, 32, 16, generator)
    q = torch.randn(75, 2, 32, generator=generator).to(device)
    cache = [keys.k_cache.to(device), keys.v_cache.to(device)]
    tables, lengths = keys.block_tables.to(device), keys.seq_lens.to(device)
    starts = query_starts([1, 4, 70]).to(device)
    together = paged_attention(q, *cache, tables, lengths, starts, 0.3)
    for b, (first, end) in enumerate([(0, 1), (1, 5), (5, 75)]):
        alone = paged_attention(
            q[first:end],
            *cache,
            tables[b : b + 1],
            lengths[b : b + 1],
            query_starts([end - first]).to(device),
            0.3,
        )
        assert torch.equal(alone, together[first:end])


def test_launches_cover_every_number_of_queries_once() -> None:
    for T, B, group in [(1, 1, 4), (16, 16, 3), (100, 100, 8), (65, 2, 1), (300, 8, 32)]:
        launches = launches_for(T, B, group, 128, 128, 2, TARGETS["sm_90"])
        reach = [launch.most for launch in launches]
        assert [launch.least for launch in launches] == [1, *(most + 1 for most in reach[:-1])]
        assert reach[-1] >= T
        assert all(launch.tiling.rows >= group for launch in launches)


def test_what_does_not_fit_is_named(device: torch.device, generator: torch.Generator) -> None:
    keys = random_keys([5], 2, 32, 16, generator)
    cache = (keys.k_cache.to(device), keys.v_cache.to(device))
    tables, lengths = keys.block_tables.to(device), keys.seq_lens.to(device)
    q, starts = torch.zeros(1, 4, 32, device=device), query_starts([1]).to(device)
    with pytest.raises(TypeError, match="must be contiguous int32"):
        paged_attention(q, *cache, tables.long(), lengths, starts, 1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        paged_attention(q[:, :3], *cache, tables, lengths, starts, 1.0)
    with pytest.raises(TypeError, match="the caches"):
        paged_attention(q.half(), *cache, tables, lengths, starts, 1.0)
