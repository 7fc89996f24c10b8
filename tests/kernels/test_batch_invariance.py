"""A row's result is bitwise the same alone and beside any others: what drafts are verified on.

The native versions only; each operation in the form in which a step runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from random_batches import query_starts
from torch import Tensor

from quickchange_kernels.attention.paged_attention_contract import paged_attention
from quickchange_kernels.elementwise.rms_norm import add_rms_norm, rms_norm
from quickchange_kernels.elementwise.rotary import rotary_
from quickchange_kernels.elementwise.silu_mul import silu_mul
from quickchange_kernels.linear.linear_float import linear
from quickchange_kernels.linear.linear_int8 import linear_int8, quantize_int8
from quickchange_kernels.lowrank.lowrank_contract import lowrank_
from quickchange_kernels.random_inputs import make_segments, random_keys, random_tables

pytestmark = pytest.mark.usefixtures("native_version")
ROWS = range(1, 41)
HEADS, KV_HEADS, SIZE = 9, 3, 64


@pytest.mark.parametrize(("features", "width"), [(576, 80), (131, 33)])
def test_linear(features: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(65, features, generator=generator).to(dtype)
    weight = torch.randn(width, features, generator=generator).to(dtype)
    alone = torch.cat([linear(x[i : i + 1], weight) for i in range(65)])
    for rows in (*ROWS, 48, 63, 64, 65):
        assert torch.equal(linear(x[:rows], weight), alone[:rows]), rows
        assert torch.equal(linear(x[-rows:], weight), alone[-rows:]), rows


def test_linear_over_int8_weights(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(40, 96, generator=generator).to(dtype)
    weight = quantize_int8(torch.randn(70, 96, generator=generator))
    alone = torch.cat([linear_int8(x[i : i + 1], *weight) for i in range(40)])
    for rows in ROWS:
        assert torch.equal(linear_int8(x[:rows], *weight), alone[:rows]), rows


def test_lowrank(dtype: torch.dtype, generator: torch.Generator) -> None:
    tables = random_tables(96, (40, 24), (16, 20, 8), generator, dtype=dtype)
    x = torch.randn(40, 96, generator=generator).to(dtype)
    y = torch.randn(40, 64, generator=generator).to(dtype)

    def updated(begin: int, end: int, spans: Sequence[tuple[int, int, int, float]]) -> Tensor:
        out = y[begin:end].clone()
        lowrank_(out, x[begin:end], tables, make_segments(spans), 0)
        return out

    alone = torch.cat([updated(i, i + 1, [(0, 1, i // 20, 0.5)]) for i in range(40)])
    for rows in ROWS:
        spans = [(0, min(rows, 20), 0, 0.5), (20, max(rows, 20), 1, 0.5)]
        live = [span for span in spans if span[0] < span[1]]
        assert torch.equal(updated(0, rows, live), alone[:rows]), rows


def test_norms_activations_and_rotations(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, delta = (torch.randn(40, 576, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(576, generator=generator).to(dtype)
    cos, sin = (torch.randn(40, SIZE, generator=generator).to(dtype) for _ in range(2))

    def run(begin: int, end: int) -> list[Tensor]:
        own, added = x[begin:end], delta[begin:end]
        q = own.reshape(-1, HEADS, SIZE).clone()
        k = added[:, : KV_HEADS * SIZE].reshape(-1, KV_HEADS, SIZE).clone()
        rotary_(q, k, cos[begin:end], sin[begin:end])
        summed, normed = add_rms_norm(own, added, weight, 1e-5, 0.0)
        return [rms_norm(own, weight, 1e-5, 0.0), summed, normed, silu_mul(own), q, k]

    alone = [torch.cat(parts) for parts in zip(*(run(i, i + 1) for i in range(40)), strict=True)]
    for rows in ROWS:
        for out, expected in zip(run(0, rows), alone, strict=True):
            assert torch.equal(out, expected[:rows]), rows


@pytest.mark.parametrize("window", [0, 100])
def test_attention_of_drafts_equals_that_of_their_tokens_one_by_one(
    window: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A chain beside other sequences and alone."""
    lengths = [5, 63, 64, 66, 130, 255, 258, 300, 530, 700]
    drafts = [1, 3, 2, 5, 21, 2, 8, 40, 16, 64]
    keys = random_keys(lengths, KV_HEADS, SIZE, 16, generator, dtype)
    caches = (keys.k_cache, keys.v_cache)
    q = torch.randn(sum(drafts), HEADS, SIZE, generator=generator).to(dtype)
    scale = SIZE**-0.5
    together = paged_attention(
        q, *caches, keys.block_tables, keys.seq_lens, query_starts(drafts), scale, window
    )
    row = 0
    for b, (length, count) in enumerate(zip(lengths, drafts, strict=True)):
        for i in range(count):
            alone = paged_attention(
                q[row : row + 1], *caches, keys.block_tables[b : b + 1],
                torch.tensor([length - count + i + 1], dtype=torch.int32),
                query_starts([1]), scale, window,
            )  # fmt: skip
            assert torch.equal(alone[0], together[row]), (length, count, i)
            row += 1
