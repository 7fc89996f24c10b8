"""Triton version of turbo_heads and head_logits; see turbo_heads_contract.py.

A program computes some columns of one segment's items, ROWS at a time. Its slice of the matrix
comes from memory once; with more items than ROWS, again from the second-level cache. ROWS is the
same for any number of items, so that the order of a sum is too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.turbo_heads.turbo_heads_contract import PAGE_ROWS

ROWS = 16  # the least that a tensor core's product takes


@dataclass(frozen=True)
class Blocks:
    """Block sizes and launch options."""

    columns: int
    depth: int  # features of one step of the sums
    warps: int
    stages: int


@triton.jit
def turbo_heads_kernel(
    # pointers
    x,  # [T, N]; not read without RESIDUAL
    z,  # [T, K]
    arena,  # [E]
    pages,  # int64 [P]
    matrices,  # int32 [G, 2]
    items,  # int32 [I, 2]
    segments,  # int32 [S, 3]
    out,  # [I, N]
    # sizes
    N,
    K,
    # strides
    stride_x,
    stride_z,
    # meta
    RESIDUAL: tl.constexpr,  # out = x + SiLU(sums) rather than the sums
    ALIGNED: tl.constexpr,  # K is a multiple of 16: weight rows begin at multiples of 32 bytes
    EVEN: tl.constexpr,  # N is a multiple of COLUMNS and K of DEPTH
    NARROW: tl.constexpr,  # products in the operands' own 16 bits
    PAGE: tl.constexpr,  # outputs in a page
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (block of columns, segment)."""
    segment = tl.program_id(1)
    begin = tl.load(segments + 3 * segment)
    end = tl.load(segments + 3 * segment + 1)
    if begin < end:
        matrix = tl.load(segments + 3 * segment + 2).to(tl.int64)
        first = tl.load(matrices + 2 * matrix)
        n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        inside = n < N
        page = tl.load(pages + first + n // PAGE, mask=inside, other=0)
        if ALIGNED:
            page = tl.multiple_of(page, 16)
        bias = tl.load(arena + page + PAGE * K + n % PAGE, mask=inside, other=0.0)
        weights = arena + (page + n % PAGE * K)[:, None] + k[None, :]  # [COLUMNS, DEPTH]
        for start in range(begin, end, ROWS):
            i = start + tl.arange(0, ROWS)
            live = i < end
            row = tl.load(items + 2 * i, mask=live, other=0).to(tl.int64)
            place = tl.load(items + 2 * i + 1, mask=live, other=0).to(tl.int64)
            own = z + row[:, None] * stride_z  # [ROWS, 1]
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for done in range(0, K, DEPTH):
                if EVEN:
                    a = tl.load(own + done + k[None, :], mask=live[:, None], other=0.0)
                    w = tl.load(weights + done)  # stream
                else:
                    left = (done + k < K)[None, :]
                    a = tl.load(own + done + k[None, :], mask=live[:, None] & left, other=0.0)
                    w = tl.load(weights + done, mask=inside[:, None] & left, other=0.0)  # stream
                if not NARROW:
                    a = a.to(tl.float32)
                    w = w.to(tl.float32)
                sums = tl.dot(a, tl.trans(w), sums, input_precision="ieee")
            y = sums + bias.to(tl.float32)[None, :]
            kept = live[:, None] & inside[None, :]
            if RESIDUAL:
                residual = tl.load(x + row[:, None] * stride_x + n[None, :], mask=kept, other=0.0)
                y = residual.to(tl.float32) + y / (1.0 + tl.exp(-y))
            tl.store(out + place[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=kept)


def launch_turbo_heads(
    x: Tensor,
    z: Tensor,
    arena: Tensor,
    pages: Tensor,
    matrices: Tensor,
    items: Tensor,
    segments: Tensor,
) -> Tensor:
    """turbo_heads; see turbo_heads_contract.py."""
    out = torch.empty((items.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    _launch(x, z, (arena, pages, matrices, items, segments), out)
    return out


def launch_head_logits(
    z: Tensor,
    arena: Tensor,
    pages: Tensor,
    matrices: Tensor,
    items: Tensor,
    segments: Tensor,
    width: int,
) -> Tensor:
    """head_logits; see turbo_heads_contract.py."""
    out = torch.empty((items.shape[0], width), dtype=torch.float32, device=z.device)
    _launch(None, z, (arena, pages, matrices, items, segments), out)
    return out


def _launch(x: Tensor | None, z: Tensor, tables: tuple[Tensor, ...], out: Tensor) -> None:
    arena, segments = tables[0], tables[-1]
    width, features = out.shape[1], z.shape[1]
    if out.numel() == 0 or segments.shape[0] == 0:
        return
    narrow = z.dtype == arena.dtype and z.dtype != torch.float32
    blocks = blocks_for(features, narrow=narrow)
    own = z if x is None else x
    turbo_heads_kernel[(triton.cdiv(width, blocks.columns), segments.shape[0])](
        own, z, *tables, out, width, features, own.stride(0), z.stride(0),
        **_constants(width, features, blocks, narrow=narrow, residual=x is not None),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def blocks_for(features: int, *, narrow: bool) -> Blocks:
    """Blocks for matrices with `features` inputs; narrow: 16-bit operands."""
    depth = min(256 if narrow else 64, max(16, triton.next_power_of_2(features)))
    # 32 columns: a single segment at H = 4096 is 128 programs, about one for each multiprocessor
    return Blocks(columns=32, depth=depth, warps=4, stages=2)


def _constants(
    width: int, features: int, blocks: Blocks, *, narrow: bool, residual: bool
) -> dict[str, int | bool]:
    return {
        "RESIDUAL": residual,
        "ALIGNED": features % 16 == 0,
        "EVEN": width % blocks.columns == 0 and features % blocks.depth == 0,
        "NARROW": narrow,
        "PAGE": PAGE_ROWS,
        "ROWS": ROWS,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
    }


def compilations() -> Iterator[Compilation]:
    """Configurations for the widths of Llama-3.1-8B, 70B and SmolLM2-135M.

    In bf16, float32, and a bf16 arena under float32; also a head that reads an embedding, and an
    LM head of its own.
    """
    for width in (4096, 8192, 576):
        for x, arena in (("*bf16", "*bf16"), ("*fp32", "*bf16"), ("*fp32", "*fp32")):
            name = f"turbo_heads {width}, x {x[1:]}, arena {arena[1:]}"
            yield _compilation(name, width, width, x, arena, residual=True)
    for name, width, features, residual in (
        ("turbo_heads 2 x 4096", 4096, 8192, True),
        ("head_logits 4096 to 128256", 128256, 4096, False),
    ):
        yield _compilation(name, width, features, "*bf16", "*bf16", residual=residual)


def _compilation(
    name: str, width: int, features: int, x: str, arena: str, *, residual: bool
) -> Compilation:
    narrow = x == arena == "*bf16"
    blocks = blocks_for(features, narrow=narrow)
    return Compilation(
        name=name,
        kernel=turbo_heads_kernel,
        signature={
            "x": x, "z": x, "arena": arena, "pages": "*i64", "matrices": "*i32", "items": "*i32",
            "segments": "*i32", "out": x if residual else "*fp32", "N": "i32", "K": "i32",
            "stride_x": "i32", "stride_z": "i32",
        },
        constants=_constants(width, features, blocks, narrow=narrow, residual=residual),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        divisible_by_16=("N", "K", "stride_x", "stride_z"),
        products=narrow,
    )  # fmt: skip
