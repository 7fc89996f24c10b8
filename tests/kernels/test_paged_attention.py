"""paged_attention and kv_write_ against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from random_batches import query_starts as starts
from torch import Tensor

from quickchange_kernels.attention.kv_write import kv_write_, plain_kv_write_, reference_kv_write
from quickchange_kernels.attention.paged_attention_contract import (
    paged_attention,
    plain_paged_attention,
    reference_paged_attention,
)
from quickchange_kernels.random_inputs import random_keys

Attention = Callable[..., Tensor]
Close = Callable[[Tensor, Tensor], None]


@pytest.fixture
def run(version: str) -> Attention:
    return plain_paged_attention if version == "plain" else paged_attention


def compare(
    run: Attention,
    assert_close: Close,
    generator: torch.Generator,
    *,
    lengths: Sequence[int],
    counts: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    block_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    value_dim: int | None = None,
    sinks: bool = False,
    slopes: bool = False,
) -> None:
    keys = random_keys(lengths, heads[1], dim, block_size, generator, dtype, value_dim)
    q = torch.randn(sum(counts), heads[0], dim, generator=generator).to(dtype)
    args = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts(counts))
    by_head = (
        torch.randn(heads[0], generator=generator) * 2 if sinks else None,
        torch.rand(heads[0], generator=generator) if slopes else None,
    )
    scoring = (dim**-0.5, window, softcap, *by_head)
    out = run(*args, *scoring)
    assert out.shape == (*q.shape[:2], keys.v_cache.shape[3])
    assert out.dtype == dtype
    assert_close(out, reference_paged_attention(*args, *scoring))


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1), (32, 2)])
@pytest.mark.parametrize("dim", [32, 64, 72, 128, 256])
def test_decode_matches_float64_for_every_head_shape(
    heads: tuple[int, int],
    dim: int,
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[1, 17, 40],
        counts=[1, 1, 1],
        heads=heads,
        dim=dim,
        dtype=dtype,
    )


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 1, 0, 37], [2, 64, 1, 5]])
def test_block_sizes_and_mixed_query_lengths(
    block_size: int,
    counts: list[int],
    run: Attention,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    lengths = [3, 131, 65, 37]
    compare(run, assert_close, generator, lengths=lengths, counts=counts, block_size=block_size)


@pytest.mark.parametrize("window", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_windows_and_softcaps(
    window: int, softcap: float, run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[70, 33, 90],
        counts=[1, 4, 40],
        window=window,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_long_context_and_a_long_prefill(
    softcap: float,
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[1500, 300, 700],
        counts=[1, 300, 129],
        softcap=softcap,
        dtype=dtype,
    )


@pytest.mark.parametrize("heads", [(3, 1), (32, 2), (64, 1)])
@pytest.mark.parametrize("dim", [16, 72, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_long_chunks_of_every_head_shape(
    heads: tuple[int, int],
    dim: int,
    window: int,
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[150, 70],
        counts=[90, 70],
        heads=heads,
        dim=dim,
        window=window,
        dtype=dtype,
    )


def test_a_head_wider_than_the_blocked_products_take(
    run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    compare(run, assert_close, generator, lengths=[90], counts=[80], dim=320)


@pytest.mark.parametrize("dims", [(24, 16), (20, 33), (192, 128), (576, 512), (7, 5), (1, 3)])
@pytest.mark.parametrize("heads", [(4, 4), (16, 2), (5, 1)])
def test_values_of_another_width_than_keys(
    dims: tuple[int, int],
    heads: tuple[int, int],
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[300, 70, 90],
        counts=[1, 12, 80],
        heads=heads,
        dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
    )


@pytest.mark.parametrize(("sinks", "slopes"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("window", [0, 1, 30, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sinks_and_slopes(
    sinks: bool,
    slopes: bool,
    window: int,
    softcap: float,
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[1, 600, 33, 90],
        counts=[1, 1, 4, 80],
        heads=(6, 2),
        window=window,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        dtype=dtype,
    )


@pytest.mark.parametrize("counts", [[1], [5], [90]])
@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_a_sink_far_from_every_score(
    counts: list[int], sink: float, run: Attention, generator: torch.Generator
) -> None:
    """It takes all of the weight, or none, and nothing overflows."""
    keys = random_keys([300], 1, 32, 16, generator)
    q = torch.randn(sum(counts), 2, 32, generator=generator)
    args = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts(counts), 0.3)
    out = run(*args, 0, 0.0, torch.full((2,), sink))
    expected = torch.zeros_like(q) if sink > 0 else run(*args)
    assert torch.equal(out, expected) if sink > 0 else torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (32, 2)])
@pytest.mark.parametrize("counts", [[1, 2, 16, 5], [64, 1, 0, 30]])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_drafts_beside_decoding(
    heads: tuple[int, int],
    counts: list[int],
    softcap: float,
    run: Attention,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    compare(
        run,
        assert_close,
        generator,
        lengths=[64, 70, 300, 30],
        counts=counts,
        heads=heads,
        softcap=softcap,
        dtype=dtype,
    )


@pytest.mark.parametrize("window", [1, 2, 3, 20, 100])
def test_drafts_in_a_window(
    window: int, run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    compare(run, assert_close, generator, lengths=[30, 12, 300], counts=[8, 12, 64], window=window)


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 20, 2], [70, 2, 1]])
def test_padding_is_harmless(
    counts: list[int], run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    """A sequence of length 0, whatever queries it claims, and rows after the last sequence."""
    keys = random_keys([80, 5, 40], 1, 32, 16, generator)
    keys.seq_lens[1] = 0
    keys.block_tables[1] = 2**30
    live = sum(counts)
    q = torch.randn(live + 7, 2, 32, generator=generator)
    cache = (keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts(counts), 0.3)
    out = run(q, *cache)
    owned = [*range(counts[0]), *range(counts[0] + counts[1], live)]
    assert_close(out[owned], reference_paged_attention(q, *cache)[owned])


@pytest.mark.parametrize("counts", [[1, 3], [70, 1]])
def test_blocks_before_the_window_are_never_looked_up(
    counts: list[int], run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    keys = random_keys([200, 110], 1, 32, 16, generator)
    q = torch.randn(sum(counts), 2, 32, generator=generator)
    cache = (keys.k_cache, keys.v_cache)
    rest = (keys.seq_lens, starts(counts), 0.3, 20)
    expected = reference_paged_attention(q, *cache, keys.block_tables, *rest)
    tables = keys.block_tables.clone()
    for b, (length, count) in enumerate(zip([200, 110], counts, strict=True)):
        tables[b, : (length - count - 19) // 16] = 2**30
    assert_close(run(q, *cache, tables, *rest), expected)


def test_queries_may_be_a_slice_of_a_fused_projection(
    run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    keys = random_keys([20, 50], 2, 32, 16, generator)
    fused = torch.randn(31, 256, generator=generator)
    q = fused[:, 64:192].view(31, 4, 32)
    args = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts([1, 30]))
    assert_close(run(*args, 0.2), reference_paged_attention(*args, 0.2))


def test_scores_far_apart_do_not_overflow(
    run: Attention, generator: torch.Generator, assert_close: Close
) -> None:
    keys = random_keys([200], 1, 32, 16, generator)
    keys.k_cache.mul_(50)
    q = torch.randn(1, 2, 32, generator=generator) * 50
    args = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts([1]))
    assert_close(run(*args, 1.0), reference_paged_attention(*args, 1.0))


@pytest.mark.usefixtures("native_version")
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("by_head", [False, True], ids=["", "sinks and slopes"])
def test_a_sequences_result_depends_on_nothing_but_itself(
    window: int, by_head: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    keys = random_keys([600, 33, 301], 2, 40, 16, generator, dtype, 28)
    q = torch.randn(12, 6, 40, generator=generator).to(dtype)
    cache = (keys.k_cache, keys.v_cache)
    tables, lengths = keys.block_tables, keys.seq_lens
    scoring = [0.1, window, 0.0]
    if by_head:
        scoring += [torch.randn(6, generator=generator), torch.rand(6, generator=generator)]
    together = paged_attention(q, *cache, tables, lengths, starts([1, 3, 8]), *scoring)
    for b, first, count in [(0, 0, 1), (1, 1, 3), (2, 4, 8)]:
        for i in range(count):  # the queries of a chunk one by one, as decoding meets them
            alone = paged_attention(
                q[first + i : first + i + 1],
                *cache,
                tables[b : b + 1].contiguous(),
                lengths[b : b + 1] - count + 1 + i,
                starts([1]),
                *scoring,
            )
            assert torch.equal(alone[0], together[first + i])


@pytest.mark.usefixtures("native_version")
def test_bad_inputs_are_named(generator: torch.Generator) -> None:
    keys = random_keys([5], 2, 32, 16, generator)
    q, cache = torch.zeros(1, 4, 32), (keys.k_cache, keys.v_cache)
    with pytest.raises(TypeError, match="must be contiguous int32"):
        paged_attention(q, *cache, keys.block_tables.long(), keys.seq_lens, starts([1]), 1.0)
    with pytest.raises(ValueError, match="do not fit together"):
        paged_attention(q[:, :3], *cache, keys.block_tables, keys.seq_lens, starts([1]), 1.0)
    with pytest.raises(ValueError, match="sequence 0 has 9 queries and 5 keys"):
        paged_attention(
            torch.zeros(9, 4, 32), *cache, keys.block_tables, keys.seq_lens, starts([9]), 1.0
        )
    rest = (keys.block_tables, keys.seq_lens, starts([1]), 1.0, 0, 0.0)
    with pytest.raises(ValueError, match=r"sinks \[3\] must be one for each of 4 query heads"):
        paged_attention(q, *cache, *rest, torch.zeros(3))
    with pytest.raises(TypeError, match="slopes must be contiguous float32"):
        paged_attention(q, *cache, *rest, None, torch.zeros(4).bfloat16())
    with pytest.raises(IndexError, match=r"slots\[0\] is 99"):
        kv_write_(torch.zeros(1, 2, 32), torch.zeros(1, 2, 32), *cache, torch.tensor([99]))


@pytest.mark.usefixtures("native_version")
def test_a_dtype_without_a_native_version_goes_to_plain_torch(generator: torch.Generator) -> None:
    keys = random_keys([5, 9], 2, 32, 16, generator, torch.float64)
    q = torch.randn(4, 4, 32, generator=generator, dtype=torch.float64)
    args = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens, starts([1, 3]), 0.2)
    assert torch.equal(paged_attention(*args), plain_paged_attention(*args))


@pytest.mark.parametrize("write", [plain_kv_write_, kv_write_], ids=["plain", "dispatched"])
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("value_dim", [24, 17])
def test_keys_and_values_land_in_their_slots(
    write: Callable[..., None],
    count: int,
    value_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    caches = [
        torch.randn(6, 2, 4, width, generator=generator).to(dtype) for width in (24, value_dim)
    ]
    fused = torch.randn(count, 200, generator=generator).to(dtype)
    k = fused[:, 20:68].view(count, 2, 24)
    v = fused[:, 100 : 100 + 2 * value_dim].view(count, 2, value_dim)
    slots = torch.randperm(24, generator=generator)[:count]
    slots[2:4] = -1  # padding
    expected = reference_kv_write(k, v, caches[0], caches[1], slots)
    write(k, v, caches[0], caches[1], slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])
