"""Triton version of turbo_heads; see turbo_heads.py.

A program computes some columns of one segment's items, ROWS at a time. Its slice of the head's
weights comes from memory once; with more items than ROWS, again from the second-level cache. ROWS
is the same for any number of items, so that the order of a sum is too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation

ROWS = 16  # the least that a tensor core's product takes


@dataclass(frozen=True)
class Blocks:
    """How the work is cut."""

    columns: int
    depth: int  # of one step of the sums
    warps: int
    stages: int


@triton.jit
def turbo_heads_kernel(
    x,  # [T, H]
    arena,  # [E]
    offsets,  # int64 [G, 2]
    items,  # int32 [I, 2]
    segments,  # int32 [S, 3]
    out,  # [I, H]
    H,
    stride_x,
    ALIGNED: tl.constexpr,  # H is a multiple of 16: weight rows begin at multiples of 32 bytes
    EVEN: tl.constexpr,  # H is a multiple of COLUMNS and DEPTH
    NARROW: tl.constexpr,  # products in the operands' own 16 bits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    segment = tl.program_id(1)
    begin = tl.load(segments + 3 * segment)
    end = tl.load(segments + 3 * segment + 1)
    if begin < end:
        head = tl.load(segments + 3 * segment + 2).to(tl.int64)
        first = tl.load(offsets + 2 * head)
        if ALIGNED:
            first = tl.multiple_of(first, 16)
        n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        inside = n < H
        bias = tl.load(arena + tl.load(offsets + 2 * head + 1) + n, mask=inside, other=0.0)
        weights = arena + first + n.to(tl.int64)[:, None] * H + k[None, :]  # [COLUMNS, DEPTH]
        for start in range(begin, end, ROWS):
            i = start + tl.arange(0, ROWS)
            live = i < end
            row = tl.load(items + 2 * i, mask=live, other=0).to(tl.int64)
            place = tl.load(items + 2 * i + 1, mask=live, other=0).to(tl.int64)
            own = x + row[:, None] * stride_x  # [ROWS, 1]
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for done in range(0, H, DEPTH):
                if EVEN:
                    a = tl.load(own + done + k[None, :], mask=live[:, None], other=0.0)
                    w = tl.load(weights + done)  # stream
                else:
                    left = (done + k < H)[None, :]
                    a = tl.load(own + done + k[None, :], mask=live[:, None] & left, other=0.0)
                    w = tl.load(weights + done, mask=inside[:, None] & left, other=0.0)  # stream
                if not NARROW:
                    a = a.to(tl.float32)
                    w = w.to(tl.float32)
                sums = tl.dot(a, tl.trans(w), sums, input_precision="ieee")
            z = sums + bias.to(tl.float32)[None, :]
            kept = live[:, None] & inside[None, :]
            residual = tl.load(own + n[None, :], mask=kept, other=0.0).to(tl.float32)
            h = residual + z / (1.0 + tl.exp(-z))
            tl.store(out + place[:, None] * H + n[None, :], h.to(out.dtype.element_ty), mask=kept)


def launch_turbo_heads(
    x: Tensor, arena: Tensor, offsets: Tensor, items: Tensor, segments: Tensor
) -> Tensor:
    """turbo_heads; see turbo_heads.py."""
    width = x.shape[1]
    out = torch.empty((items.shape[0], width), dtype=x.dtype, device=x.device)
    if out.numel() and segments.shape[0]:
        narrow = x.dtype == arena.dtype and x.dtype != torch.float32
        blocks = blocks_for(width, narrow=narrow)
        grid = (triton.cdiv(width, blocks.columns), segments.shape[0])
        turbo_heads_kernel[grid](
            x, arena, offsets, items, segments, out, width, x.stride(0),
            **_constants(width, blocks, narrow=narrow),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out


def blocks_for(width: int, *, narrow: bool) -> Blocks:
    """The blocks for heads of H = width; narrow: 16-bit operands."""
    depth = min(256 if narrow else 64, max(16, triton.next_power_of_2(width)))
    # 32 columns: a single segment at H = 4096 is 128 programs, about one for each multiprocessor
    return Blocks(columns=32, depth=depth, warps=4, stages=2)


def _constants(width: int, blocks: Blocks, *, narrow: bool) -> dict[str, int | bool]:
    return {
        "ALIGNED": width % 16 == 0,
        "EVEN": width % blocks.columns == 0 and width % blocks.depth == 0,
        "NARROW": narrow,
        "ROWS": ROWS,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
    }


def compilations() -> Iterator[Compilation]:
    """Llama-3.1-8B's, 70B's and SmolLM2-135M's widths: bf16, float32, and bf16 under float32."""
    for width in (4096, 8192, 576):
        for x, arena in (("*bf16", "*bf16"), ("*fp32", "*bf16"), ("*fp32", "*fp32")):
            narrow = x == arena == "*bf16"
            blocks = blocks_for(width, narrow=narrow)
            yield Compilation(
                name=f"turbo_heads {width}, x {x[1:]}, arena {arena[1:]}",
                kernel=turbo_heads_kernel,
                signature={
                    "x": x, "arena": arena, "offsets": "*i64", "items": "*i32", "segments": "*i32",
                    "out": x, "H": "i32", "stride_x": "i32",
                },
                constants=_constants(width, blocks, narrow=narrow),
                num_warps=blocks.warps,
                num_stages=blocks.stages,
                divisible_by_16=("H", "stride_x"),
                products=narrow,
            )  # fmt: skip
