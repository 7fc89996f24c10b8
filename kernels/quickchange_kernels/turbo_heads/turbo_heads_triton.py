"""Triton version of turbo_heads and head_logits; see turbo_heads_contract.py.

A program computes some columns of one segment's items, ROWS at a time. Its slice of the matrix
comes from memory once; with more items than ROWS, again from the second-level cache. ROWS is the
same for any number of items, so that the order of a sum is too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.launch_config import (
    WIDE,
    LaunchConfig,
    aligned,
    fixed_kernel,
    pointer,
    wide_row,
    wide_size,
)
from quickchange_kernels.turbo_heads.turbo_heads_contract import PAGE_ROWS

ROWS = 16  # the least that a tensor core's product takes
COLUMNS = 32  # a single segment at H = 4096 is 128 programs, about one for each multiprocessor


@fixed_kernel
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
    ALIGNED: tl.constexpr,  # rows of z and of the matrices begin at multiples of 16 bytes
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
        if EVEN:
            N = N // COLUMNS * COLUMNS
            K = K // DEPTH * DEPTH
        else:
            K = wide_size(K, arena, ALIGNED)
        n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        inside = n < N
        page = tl.load(pages + first + n // PAGE, mask=inside, other=0)
        bias = tl.load(arena + page + PAGE * K + n % PAGE, mask=inside, other=0.0)
        outputs = wide_row(arena, page + n % PAGE * K, ALIGNED)
        weights = outputs[:, None] + k[None, :]  # [COLUMNS, DEPTH]
        for start in range(begin, end, ROWS):
            i = start + tl.arange(0, ROWS)
            live = i < end
            row = tl.load(items + 2 * i, mask=live, other=0).to(tl.int64)
            place = tl.load(items + 2 * i + 1, mask=live, other=0).to(tl.int64)
            own = wide_row(z, row * stride_z, ALIGNED)
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for done in range(0, K, DEPTH):
                if EVEN:
                    a = tl.load(own[:, None] + done + k[None, :], mask=live[:, None], other=0.0)
                    w = tl.load(weights + done)  # stream
                else:
                    left = (done + k < K)[None, :]
                    a = tl.load(
                        own[:, None] + done + k[None, :], mask=live[:, None] & left, other=0.0
                    )
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
    own = z if x is None else x
    wide = aligned(z, arena) and features * arena.itemsize % WIDE == 0
    config = _config(width, features, z.dtype, arena.dtype, residual=x is not None, wide=wide)
    turbo_heads_kernel[(triton.cdiv(width, COLUMNS), segments.shape[0])](
        own, z, *tables, out, width, features, own.stride(0), z.stride(0), **config.keywords
    )


def _config(
    width: int, features: int, z: torch.dtype, arena: torch.dtype, *, residual: bool, wide: bool
) -> LaunchConfig:
    narrow = z == arena and z.itemsize == 2
    depth = min(256 if narrow else 64, max(16, triton.next_power_of_2(features)))
    constants = {
        "RESIDUAL": residual,
        "ALIGNED": wide,
        "EVEN": width % COLUMNS == 0 and features % depth == 0,
        "NARROW": narrow,
        "PAGE": PAGE_ROWS,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": depth,
    }
    return LaunchConfig(constants, num_warps=4, num_stages=2)


def compilations_for(
    width: int,
    features: int,
    dtype: torch.dtype,
    arena: torch.dtype,
    *,
    residual: bool,
    wide: bool | None = None,
) -> Iterator[Compilation]:
    """All that turbo_heads, or head_logits without the residual, launches for one kind of matrix.

    dtype: that of x and z. wide: `aligned` of z and the arena; None: as rows of so many features
    are.
    """
    if wide is None:
        wide = all(features * each.itemsize % WIDE == 0 for each in (dtype, arena))
    name = f"{'turbo_heads' if residual else 'head_logits'} {features} to {width}"
    name += "" if wide else ", odd"
    yield _config(width, features, dtype, arena, residual=residual, wide=wide).compilation(
        f"{name}, x {pointer(dtype)[1:]}, arena {pointer(arena)[1:]}",
        turbo_heads_kernel,
        {
            "x": pointer(dtype),
            "z": pointer(dtype),
            "arena": pointer(arena),
            "pages": "*i64",
            "matrices": "*i32",
            "items": "*i32",
            "segments": "*i32",
            "out": pointer(dtype) if residual else "*fp32",
            "N": "i32",
            "K": "i32",
            "stride_x": "i32",
            "stride_z": "i32",
        },
        products=dtype == arena and dtype.itemsize == 2,
    )


def compilations() -> Iterator[Compilation]:
    """Configurations for the widths of Llama-3.1-8B and SmolLM2-135M.

    In each dtype, and a bf16 arena under float32; also a head that reads an embedding, and an LM
    head of its own.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for width in (4096, 576):
        for x, arena in ((bf16, bf16), (fp16, fp16), (fp32, bf16), (fp32, fp32)):
            yield from compilations_for(width, width, x, arena, residual=True)
    yield from compilations_for(4096, 8192, bf16, bf16, residual=True)
    yield from compilations_for(128256, 4096, bf16, bf16, residual=False)
