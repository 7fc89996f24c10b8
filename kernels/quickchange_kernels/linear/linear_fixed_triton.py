"""Triton version of linear_fixed; see linear_float.py.

The features are summed in splits, each in steps of BLOCK_K, and the splits are added in order. How
many there are follows from the matrix's shape alone. With few rows a program sums one split, so
that enough of them read the weights, and a second kernel adds them; with many a program sums all of
its own, one after another: the same sums in the same order. Weights are the product's left factor,
so that tensor cores take the same instruction, but for the number of rows in it, in all cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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

BUSY_PROGRAMS = 264  # two on each multiprocessor of an H100
MIN_SPLIT = 1024  # features
MAX_SPLITS = 8
FEW_OUTPUTS = 64  # of a program that sums one split
HEIGHTS = (16, 64, 128)  # most rows of a kind of launch; the last for all that are more
ADD_BLOCK = 1024


@triton.jit
def _split_sum(weights, rows, inside, live, split, K: tl.constexpr, SPLIT: tl.constexpr,
               OUTPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The products summed over one split of the features: [OUTPUTS, ROWS]."""
    k = tl.arange(0, BLOCK_K)
    part = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k0 in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, K), BLOCK_K):
        in_k = tl.full((BLOCK_K,), True, tl.int1) if K % BLOCK_K == 0 else k0 + k < K
        w = tl.load(weights + k0, mask=inside[:, None] & in_k[None, :], other=0.0)  # stream
        a = tl.load(rows + k0, mask=live[:, None] & in_k[None, :], other=0.0)
        part = tl.dot(w, tl.trans(a), part, input_precision="ieee")
    return part


@fixed_kernel
def linear_fixed_kernel(
    # pointers
    x,  # [T, K]
    weight,  # [N, K]
    bias,  # [N] or None; not read where APART
    out,  # [T, N]; where APART float32 [SPLITS, T, N]
    # sizes
    T,
    N,
    # strides
    stride_x,
    stride_w,
    # meta
    K: tl.constexpr,
    SPLIT: tl.constexpr,  # features of one, a multiple of BLOCK_K
    SPLITS: tl.constexpr,
    APART: tl.constexpr,  # a program sums one split
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (block of outputs, block of rows, split)."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    inside, live = n < N, t < T
    weights = wide_row(weight, n.to(tl.int64) * stride_w, ALIGNED)[:, None] + k[None, :]
    rows = wide_row(x, t.to(tl.int64) * stride_x, ALIGNED)[:, None] + k[None, :]
    sums = _split_sum(weights, rows, inside, live, own, K, SPLIT, OUTPUTS, ROWS, BLOCK_K)
    if not APART:
        for split in range(1, SPLITS):
            sums += _split_sum(weights, rows, inside, live, split, K, SPLIT, OUTPUTS, ROWS, BLOCK_K)
    width = wide_size(N, out, ALIGNED)
    at = t.to(tl.int64)
    if APART:
        at += own.to(tl.int64) * T
    elif bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = wide_row(out, at * width, ALIGNED)[:, None] + n[None, :]
    mask = live[:, None] & (n < width)[None, :]
    tl.store(place, tl.trans(sums).to(out.dtype.element_ty), mask=mask)


@fixed_kernel
def add_splits_kernel(
    # pointers
    parts,  # float32 [SPLITS, T, N]
    bias,  # [N] or None
    out,  # [T, N]
    # sizes
    T,
    N,
    # meta
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (row, block of outputs): the splits' sums, added in order."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < wide_size(N, out, ALIGNED)
    sums = tl.load(wide_row(parts, row * N, ALIGNED) + n, mask=inside, other=0.0)  # stream
    for split in tl.static_range(1, SPLITS):
        place = wide_row(parts, (row + T.to(tl.int64) * split) * N, ALIGNED)
        sums += tl.load(place + n, mask=inside, other=0.0)  # stream
    if bias is not None:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(wide_row(out, row * N, ALIGNED) + n, sums.to(out.dtype.element_ty), mask=inside)


def splits_of(outputs: int, features: int) -> int:
    """Splits of a matrix's features: enough programs for a few rows, by its shape alone."""
    wanted = -(-BUSY_PROGRAMS // -(-outputs // FEW_OUTPUTS))
    return max(1, min(wanted, features // MIN_SPLIT, MAX_SPLITS))


def _product(
    outputs: int, features: int, dtype: torch.dtype, height: int, wide: bool
) -> LaunchConfig:
    few, narrow = height < HEIGHTS[-1], dtype.itemsize == 2
    splits = splits_of(outputs, features)
    # Where a program adds splits, it holds two tiles of sums.
    most = HEIGHTS[-1] // (1 if splits == 1 else 2) // (1 if narrow else 4)
    constants = {
        "K": features,
        "SPLIT": -(-features // (splits * _STEP)) * _STEP,
        "SPLITS": splits,
        "APART": few and splits > 1,
        "OUTPUTS": FEW_OUTPUTS if few or not narrow else 128,
        "ROWS": min(height, 32) if few else most,  # 64 spill on sm_120
        "BLOCK_K": 64 if narrow else 32,
        "ALIGNED": wide,
    }
    warps = 4 if few or not narrow else 8
    stages = 4 if few else 3
    return LaunchConfig(constants, num_warps=warps, num_stages=stages)


_STEP = 128  # features: a multiple of every BLOCK_K, so that splits end alike whatever the rows


def _addition(splits: int, wide: bool) -> LaunchConfig:
    return LaunchConfig({"SPLITS": splits, "BLOCK": ADD_BLOCK, "ALIGNED": wide}, num_warps=4)


def launch_linear_fixed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear_fixed; see linear_float.py."""
    outputs, features = weight.shape
    rows = x.reshape(-1, features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count = len(rows)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    wide = aligned(rows, weight) and outputs * x.itemsize % WIDE == 0
    height = next((each for each in HEIGHTS if count <= each), HEIGHTS[-1])
    config = _product(outputs, features, x.dtype, height, wide)
    splits = config.constants["SPLITS"]
    apart = config.constants["APART"]
    out = y
    if apart:
        out = torch.empty((splits, count, outputs), dtype=torch.float32, device=x.device)
    grid = (
        triton.cdiv(outputs, config.constants["OUTPUTS"]),
        triton.cdiv(count, config.constants["ROWS"]),
        splits if apart else 1,
    )
    linear_fixed_kernel[grid](
        rows, weight, bias, out, count, outputs, rows.stride(0), weight.stride(0), **config.keywords
    )
    if apart:
        add_splits_kernel[(count, triton.cdiv(outputs, ADD_BLOCK))](
            out, bias, y, count, outputs, **_addition(splits, wide).keywords
        )
    return y


def compilations_for(
    outputs: int, features: int, dtype: torch.dtype, *, bias: bool = False
) -> Iterator[Compilation]:
    """All that linear_fixed launches for one matrix."""
    wide = all(size * dtype.itemsize % WIDE == 0 for size in (outputs, features))
    row = pointer(dtype)
    name = f"{features} to {outputs}{', bias' if bias else ''}, {row[1:]}"
    types: dict[str, Any] = {"bias": row if bias else None, "T": "i32", "N": "i32"}
    for height in HEIGHTS:
        product = _product(outputs, features, dtype, height, wide)
        apart = product.constants["APART"]
        yield product.compilation(
            f"linear_fixed {name}, {height} rows",
            linear_fixed_kernel,
            types
            | {"x": row, "weight": row, "out": "*fp32" if apart else row}
            | {"stride_x": "i32", "stride_w": "i32"},
            products=dtype.itemsize == 2,
        )
    splits = splits_of(outputs, features)
    if splits > 1:
        yield _addition(splits, wide).compilation(
            f"linear_fixed {name}, added", add_splits_kernel, types | {"parts": "*fp32", "out": row}
        )


def compilations() -> Iterator[Compilation]:
    """Configurations for Llama 8B's output projection (in splits) and gate and up (in one)."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from compilations_for(4096, 4096, dtype)
    yield from compilations_for(28672, 4096, torch.bfloat16)
