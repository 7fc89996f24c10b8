"""Small kernels for the tests of the gate: one fit to ship, and one for each way of being unfit."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import triton
import triton.language as tl

from quickchange_kernels.compilation import Compilation


@triton.jit
def load_rows(w, at, mask):
    return tl.load(w + at, mask=mask, other=0.0)  # stream


@triton.jit
def linear(x, w, out, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * K + inner[None, :])
        b = load_rows(w, columns[:, None] * K + inner[None, :], columns[:, None] < N)
        sums = tl.dot(a, b.T, sums, input_precision="ieee")
    at = rows[:, None] * N + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=columns[None, :] < N)


@triton.jit(do_not_specialize=["K"])
def unspecialised(x, w, out, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    linear(x, w, out, K, N, BM, BN, BK)


@triton.jit
def refuse(x, WIDTH: tl.constexpr):
    tl.static_assert(WIDTH % 8 == 0, "WIDTH must be a multiple of 8")
    tl.store(x, 0.0)


@triton.jit
def scale(x, out, factor, FLAG: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    if FLAG:
        factor += tl.load(x)  # stream
    values = tl.load(
        x + at,
    )  # stream
    tl.store(out + at, values * factor)


FIT = Compilation(
    name="fit",
    kernel=linear,
    signature={"x": "*bf16", "w": "*bf16", "out": "*bf16", "K": "i32", "N": "i32"},
    constants={"BM": 16, "BN": 64, "BK": 64},
    num_warps=4,
    num_stages=2,
    divisible_by_16=("K", "N"),
    products=True,
)


def compilations() -> Iterator[Compilation]:
    yield FIT
    few_registers = {"maxnreg": 32, "waves_per_eu": 8}  # as NVIDIA's and AMD's compilers say it
    yield dataclasses.replace(FIT, name="spills", options=few_registers, num_warps=1)
    yield dataclasses.replace(FIT, name="shared", num_stages=20)
    yield dataclasses.replace(FIT, name="narrow", divisible_by_16=())
    in_float32 = {"x": "*fp32", "w": "*fp32", "out": "*fp32", "K": "i32", "N": "i32"}
    yield dataclasses.replace(FIT, name="no products", signature=in_float32)
    yield Compilation("refused", refuse, {"x": "*fp32"}, {"WIDTH": 7}, 1, 1)
    pointers = {"x": "*fp32", "out": "*fp32", "factor": "fp32"}
    yield Compilation("scale", scale, pointers, {"FLAG": False}, 4, 1, targets=("sm_80", "gfx942"))
