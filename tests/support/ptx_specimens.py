"""Small kernels for the tests of the PTX executor: between them they use most of what it knows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear(x, w, out, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [BM, N] = x [BM, K] wᵀ: pipelined copies, ldmatrix and mma."""
    rows, columns = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * K + inner[None, :], mask=inner[None, :] < K, other=0.0)
        live = (columns[:, None] < N) & (inner[None, :] < K)
        b = tl.load(w + columns[:, None] * K + inner[None, :], mask=live, other=0.0)
        sums = tl.dot(a, b.T, sums)
    at = rows[:, None] * N + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=columns[None, :] < N)


@triton.jit
def softmax(x, out, N, BLOCK: tl.constexpr):
    """Rows of x: reductions within warps and across them."""
    lanes = tl.arange(0, BLOCK)
    row = tl.program_id(0) * N
    values = tl.load(x + row + lanes, mask=lanes < N, other=float("-inf")).to(tl.float32)
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + lanes, powers / tl.sum(powers, 0), mask=lanes < N)


@triton.jit
def shifted(x, out, offset, N: tl.constexpr):
    """out[i] = x[offset + i], and promises that offset is a multiple of 8."""
    lanes = tl.multiple_of(offset + tl.arange(0, N), 8)
    tl.store(out + tl.arange(0, N), tl.load(x + lanes))


@triton.jit
def divided(x, y, out, N: tl.constexpr):
    """Integer arithmetic whose signs, widths and shifts matter."""
    lanes = tl.arange(0, N)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    result = (a // b) * 1000 + a % b + (a >> 3) + (a.to(tl.int64) * b >> 2).to(tl.int32)
    tl.store(out + lanes, result)


@triton.jit
def counted(x, out, N: tl.constexpr):
    """The number of x that are positive, by atomics."""
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.atomic_add(out, tl.sum((tl.load(x + lanes) > 0).to(tl.int32), 0))


@triton.jit
def reversed_within(x, out, N: tl.constexpr):
    """out = x from its end: goes through shared memory."""
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.flip(tl.load(x + lanes), 0))
