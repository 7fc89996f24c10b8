"""The kernels that ship, compiled for sm_80 and executed: odd sizes, warps in random order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from draft_vocabularies import random_case
from ptx_launches import launches_run_as_ptx
from ptx_memory import FaultError
from random_batches import query_starts
from turbo_items import MIXED, random_heads, random_rows

from quickchange_kernels import random_inputs
from quickchange_kernels.attention import kv_write_triton, paged_attention_triton
from quickchange_kernels.attention.kv_write import reference_kv_write
from quickchange_kernels.attention.paged_attention_contract import reference_paged_attention
from quickchange_kernels.elementwise import elementwise_triton
from quickchange_kernels.elementwise.rms_norm import reference_add_rms_norm, reference_rms_norm
from quickchange_kernels.elementwise.rotary import reference_rotary
from quickchange_kernels.elementwise.silu_mul import reference_silu_mul
from quickchange_kernels.linear import linear_fixed_triton
from quickchange_kernels.linear.linear_float import reference_linear
from quickchange_kernels.lowrank import lowrank_contract, lowrank_triton
from quickchange_kernels.lowrank.lowrank_tables import LowRankTables, Segments
from quickchange_kernels.sampling import sample_triton, verify_triton
from quickchange_kernels.sampling.sample_plain import plain_sample
from quickchange_kernels.sampling.verify import reference_verify
from quickchange_kernels.turbo_heads import draft_logits_triton, turbo_heads_triton
from quickchange_kernels.turbo_heads.draft_logits import reference_draft_logits
from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    HeadItems,
    reference_head_logits,
    reference_turbo_heads,
)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(out: Tensor, reference: Tensor) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - reference).norm() / reference.norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize(("width", "dtype"), [(37, torch.bfloat16), (576, torch.float16)])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = randn(3, width + 3, dtype=dtype)[:, 3:], randn(width, dtype=dtype)
    with launches_run_as_ptx(seed=3):
        out = elementwise_triton.launch_rms_norm(x, weight, 1e-5, 1.0)
    assert_close(out, reference_rms_norm(x, weight, 1e-5, 1.0))


def test_add_rms_norm() -> None:
    x, delta, weight = (randn(*shape, dtype=torch.bfloat16) for shape in ((2, 72), (2, 72), (72,)))
    with launches_run_as_ptx(seed=4):
        total, out = elementwise_triton.launch_add_rms_norm(x, delta, weight, 1e-5)
    expected_total, expected = reference_add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(out, expected)


@pytest.mark.parametrize(("width", "dtype"), [(1088, torch.bfloat16), (37, torch.float32)])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    x = randn(3, 2 * width, dtype=dtype)
    with launches_run_as_ptx(seed=5):
        out = elementwise_triton.launch_silu_mul(x)
    assert_close(out, reference_silu_mul(x))


def test_rotary() -> None:
    q, k = randn(2, 3, 40, dtype=torch.bfloat16), randn(2, 1, 40, dtype=torch.bfloat16)
    cos, sin = (randn(2, 40, dtype=torch.bfloat16, seed=seed) for seed in (8, 9))
    expected = [reference_rotary(x, cos, sin) for x in (q, k)]
    with launches_run_as_ptx(seed=6):
        elementwise_triton.launch_rotary_(q, k, cos, sin)
    for out, reference in zip((q, k), expected, strict=True):
        assert_close(out, reference)


def run_lowrank(tables: LowRankTables, segments: Segments, y: Tensor, x: Tensor) -> Tensor:
    """y afterwards; rows in no segment must stay what they are."""
    out = y.clone()
    operands = lowrank_contract.operands(tables, segments, 0)
    with launches_run_as_ptx(seed=7):
        lowrank_triton.launch_lowrank(out, x, *operands)
    return out


@pytest.mark.parametrize(
    ("features", "widths", "dtype", "spans"),
    [
        (576, (48, 24, 24), torch.bfloat16, [(0, 1, 0, 1.0), (1, 3, 2, 0.5), (3, 4, 1, 1.0)]),
        (37, (19, 5), torch.float16, [(0, 3, 0, 1.0), (0, 3, 2, -0.5)]),
        (136, (136,), torch.bfloat16, [(1, 40, 2, 1.0)]),
    ],
    ids=["decode", "odd sizes and a composition", "prefill"],
)
def test_lowrank(
    features: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    spans: list[tuple[int, int, int, float]],
) -> None:
    generator = torch.Generator().manual_seed(11)
    tables = random_inputs.random_tables(features, widths, (3, 0, 20), generator, dtype=dtype)
    rows = spans[-1][1]
    x, y = randn(rows, features, dtype=dtype), randn(rows, sum(widths), dtype=dtype, seed=2)
    segments = random_inputs.make_segments(spans)
    out = run_lowrank(tables, segments, y, x)
    assert_close(out, lowrank_contract.reference_lowrank(y, x, tables, segments, 0))


def test_lowrank_embedding() -> None:
    generator = torch.Generator().manual_seed(12)
    tables = random_inputs.random_tables(50, (24,), (5, 16), generator, dtype=torch.bfloat16)
    segments = random_inputs.make_segments([(0, 2, 0, 1.0), (2, 5, 1, 1.0)])
    ids = torch.randint(50, (5,), generator=generator)
    y = randn(5, 24, dtype=torch.bfloat16)
    expected = lowrank_contract.reference_lowrank_embedding(y, ids, tables, segments, 0, 50)
    with launches_run_as_ptx(seed=8):
        operands = lowrank_contract.operands(tables, segments, 0)
        lowrank_triton.launch_lowrank_embedding(y, ids, *operands, 50)
    assert_close(y, expected)


def test_a_false_claim_that_lowrank_weights_are_aligned_is_caught() -> None:
    generator = torch.Generator().manual_seed(13)
    tables = random_inputs.random_tables(64, (24,), (8,), generator, dtype=torch.bfloat16)
    pages = tables.pages.clone()
    pages[:, :2] += 1
    arena = torch.cat([tables.arena[:1], tables.arena])
    lying = dataclasses.replace(tables, arena=arena, pages=pages)
    assert lying.shapes[0].aligned
    honest = (dataclasses.replace(lying.shapes[0], aligned=False),)
    x, y = randn(2, 64, dtype=torch.bfloat16), randn(2, 24, dtype=torch.bfloat16)
    segments = random_inputs.make_segments([(0, 2, 0, 1.0)])
    expected = lowrank_contract.reference_lowrank(y, x, lying, segments, 0)
    assert_close(run_lowrank(dataclasses.replace(lying, shapes=honest), segments, y, x), expected)
    with pytest.raises(FaultError, match="misaligned"):
        run_lowrank(lying, segments, y, x)


@pytest.mark.parametrize(
    ("features", "outputs", "dtype", "biased"),
    [
        pytest.param(2048, 40, torch.bfloat16, True, id="splits", marks=pytest.mark.slow),
        pytest.param(140, 24, torch.float16, False, id="odd sizes"),
    ],
)
def test_linear_fixed_gives_a_row_the_same_bits_in_every_batch(
    features: int, outputs: int, dtype: torch.dtype, biased: bool
) -> None:
    """Few rows, a few more, and many take programs of their own; the order of sums is one."""
    x = randn(66, features, dtype=dtype)
    weight = randn(outputs, features, dtype=dtype, seed=2)
    bias = randn(outputs, dtype=dtype, seed=3) if biased else None
    with launches_run_as_ptx(seed=16):
        few, more, many = (
            linear_fixed_triton.launch_linear_fixed(x[:rows], weight, bias) for rows in (3, 18, 66)
        )
    assert torch.equal(many[:18], more)
    assert torch.equal(more[:3], few)
    assert_close(many, reference_linear(x, weight, bias))


@pytest.mark.parametrize(
    ("lengths", "counts", "window", "heads", "dtype"),
    [
        ((37, 5), (1, 1), 0, (3, 40), torch.bfloat16),
        ((40, 21), (7, 0), 11, (3, 40), torch.float16),
        ((69,), (65,), 0, (2, 24), torch.bfloat16),  # one more than is split; two tiles of rows
    ],
    ids=["decode", "drafts in a window", "prefill"],
)
def test_paged_attention(
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
    window: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(14)
    keys = random_inputs.random_keys(lengths, 1, heads[1], 16, generator, dtype)
    q = randn(sum(counts), *heads, dtype=dtype)
    arguments = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens)
    rest = (query_starts(counts), heads[1] ** -0.5, window, 5.0)
    with launches_run_as_ptx(seed=9):
        out = paged_attention_triton.launch_paged_attention(*arguments, *rest)
    assert_close(out, reference_paged_attention(*arguments, *rest))


def test_attention_over_several_splits() -> None:
    generator = torch.Generator().manual_seed(15)
    keys = random_inputs.random_keys((530,), 1, 16, 16, generator, torch.bfloat16)
    q = randn(1, 2, 16, dtype=torch.bfloat16)
    arguments = (q, keys.k_cache, keys.v_cache, keys.block_tables, keys.seq_lens)
    rest = (query_starts((1,)), 0.25)
    with launches_run_as_ptx(seed=10):
        out = paged_attention_triton.launch_paged_attention(*arguments, *rest)
    assert_close(out, reference_paged_attention(*arguments, *rest))


def test_kv_write_writes_its_slots_and_no_others() -> None:
    k, v = (randn(3, 3, 24, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    k_cache, v_cache = (randn(4, 3, 16, 24, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    slots = torch.tensor([17, -1, 63])
    expected = reference_kv_write(k[[0, 2]], v[[0, 2]], k_cache, v_cache, slots[[0, 2]])
    with launches_run_as_ptx(seed=11):
        kv_write_triton.launch_kv_write_(k, v, k_cache, v_cache, slots)
    for out, reference in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(out, reference)


@pytest.mark.parametrize(
    ("width", "features", "dtype"), [(37, 37, torch.float32), (72, 144, torch.bfloat16)]
)
def test_turbo_heads(width: int, features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(16)
    heads = random_heads(5, width, features, dtype, generator)
    x, z = (random_rows(MIXED, size, dtype, generator) for size in (width, features))
    items = HeadItems.of(MIXED)
    operands = (heads.arena, heads.pages, heads.matrices, items.items, items.segments)
    with launches_run_as_ptx(seed=12):
        out = turbo_heads_triton.launch_turbo_heads(x, z, *operands)
        logits = turbo_heads_triton.launch_head_logits(z, *operands, width)
    assert_close(out, reference_turbo_heads(x, z, heads, items))
    assert_close(logits, reference_head_logits(z, heads, items, width))


@pytest.mark.parametrize(("features", "dtype"), [(37, torch.float32), (64, torch.bfloat16)])
def test_draft_logits(features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(17)
    case = random_case([(1, 20), (3, 7)], features, generator, dtype, dtype, biased=True)
    operands = (case.h, case.weight, case.bias, case.vocabulary, case.segments, case.width)
    with launches_run_as_ptx(seed=15):
        out = draft_logits_triton.launch_draft_logits(*operands)
    expected = reference_draft_logits(*case)
    assert torch.equal(out.isneginf(), expected.isneginf())
    finite = out.isfinite()
    assert_close(out[finite], expected[finite])


def test_sample_draws_the_plain_versions_tokens() -> None:
    logits = (randn(3, 700, dtype=torch.bfloat16) * 4)[:, 3:]
    temperature, uniform, top_p, min_p, typical_p = torch.tensor(
        [[0.0, 1.0, 0.7], [0.5, 0.73, 0.99], [0.5, 1.0, 0.9], [0.1, 0.0, 0.02], [0.5, 0.6, 0.8]],
        dtype=torch.float64,
    )
    top_k = torch.tensor([3, 0, 50], dtype=torch.float64)
    how = (temperature, uniform, [top_k, top_p, min_p, typical_p], None, None, None)
    with launches_run_as_ptx(seed=13):
        tokens, sound = sample_triton.launch_sample(logits, *how)
    expected_tokens, expected_sound = plain_sample(logits, *how)
    assert tokens.tolist() == expected_tokens.tolist()
    assert sound.tolist() == expected_sound.tolist()


def test_verify_accepts_the_longest_path_that_holds() -> None:
    sampled, drafted = torch.tensor([5, 6, 9, 8, 1, 2]), torch.tensor([0, 5, 6, 3, 0, 7])
    rows = torch.tensor([[0, 4], [4, 6], [6, 6]], dtype=torch.int32)
    with launches_run_as_ptx(seed=14):
        accepted, token, path = verify_triton.launch_verify(sampled, drafted, rows, 4)
    for b, (count, last, places) in enumerate(reference_verify(sampled, drafted, rows, 4)):
        assert accepted[b] == count
        assert token[b] == last
        assert path[b, : len(places)].tolist() == places
