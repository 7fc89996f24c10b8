"""Triton versions of the row-wise operations: rms_norm, add_rms_norm, silu_mul, rotary_.

All are bound by memory. One program reads a row (or a part of one), works in float32 and rounds
once. Sums within a row run in an order that its width alone decides.
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

GATE_BLOCK = 2048  # columns of one program of silu_mul: eight a lane on 4 warps of 64
ROTARY_HEADS = 8  # heads of one program of rotary_


@fixed_kernel
def rms_norm_kernel(
    # pointers
    x,  # [T, K]
    delta,  # [T, K], not read unless ADD
    weight,  # [K]
    total,  # [T, K], not written unless ADD
    y,  # [T, K]
    # scalars
    eps,
    offset,
    # strides
    stride_x,
    stride_delta,
    # meta
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (row,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < K
    value = tl.load(wide_row(x, row * stride_x, ALIGNED) + k, mask=live, other=0.0)  # stream
    value = value.to(tl.float32)
    if ADD:
        place = wide_row(delta, row * stride_delta, ALIGNED)
        added = tl.load(place + k, mask=live, other=0.0)  # stream
        rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(wide_row(total, row * K, ALIGNED) + k, rounded, mask=live)
        value = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / K + eps)
    # a bare argument can't be known to be aligned; the grid has one column, so 0 is added
    gains = wide_row(weight, tl.program_id(1), ALIGNED)
    gain = tl.load(gains + k, mask=live, other=0.0).to(tl.float32) + offset  # stream
    normed = (value * factor * gain).to(y.dtype.element_ty)
    tl.store(wide_row(y, row * K, ALIGNED) + k, normed, mask=live)


@fixed_kernel
def silu_mul_kernel(
    # pointers
    x,  # [T, 2 I]
    y,  # [T, I]
    # sizes
    I,  # noqa: E741  the width, as in the contract
    # strides
    stride_x,
    # meta
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < wide_size(I, x, ALIGNED)
    gates = wide_row(x, row * stride_x, ALIGNED)
    ups = wide_row(x, row * stride_x + I, ALIGNED)
    gate = tl.load(gates + i, mask=live, other=0.0).to(tl.float32)  # stream
    up = tl.load(ups + i, mask=live, other=0.0).to(tl.float32)  # stream
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(wide_row(y, row * I, ALIGNED) + i, (silu * up).to(y.dtype.element_ty), mask=live)


@triton.jit
def _rotate(x, cos, sin, first_head, heads, stride_head, HALF: tl.constexpr, BLOCK: tl.constexpr,
            HEADS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Rotate some heads of one row, in place. x: its first head; cos, sin: its row of them."""
    head = first_head + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    live = (head < heads)[:, None] & (i < HALF)[None, :]
    place = wide_row(x, head.to(tl.int64) * stride_head, ALIGNED)[:, None] + i[None, :]
    first = tl.load(place, mask=live, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    inside = i < HALF
    c1 = tl.load(cos + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(place, (first * c1 - second * s1).to(x.dtype.element_ty), mask=live)
    tl.store(place + HALF, (second * c2 + first * s2).to(x.dtype.element_ty), mask=live)


@fixed_kernel
def rotary_kernel(
    # pointers
    q,  # [T, q_heads, D]
    k,  # [T, k_heads, D]
    cos,  # [T, 2 HALF]
    sin,
    # sizes
    q_heads,
    k_heads,
    # strides
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_cos,
    stride_sin,
    # meta
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (row, HEADS heads of q, then of k)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    cos_row = wide_row(cos, row * stride_cos, ALIGNED)
    sin_row = wide_row(sin, row * stride_sin, ALIGNED)
    if part < q_parts:
        _rotate(q + row * stride_q_row, cos_row, sin_row, part * HEADS, q_heads, stride_q_head,
                HALF, BLOCK, HEADS, ALIGNED)  # fmt: skip
    else:
        _rotate(k + row * stride_k_row, cos_row, sin_row, (part - q_parts) * HEADS, k_heads,
                stride_k_head, HALF, BLOCK, HEADS, ALIGNED)  # fmt: skip


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """rms_norm; see rms_norm.py."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(rows, rows, weight, y, y, eps, offset, add=False)
    return y


def launch_add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """add_rms_norm; see rms_norm.py. Raises ValueError where the shapes differ."""
    if x.shape != delta.shape:
        raise ValueError(
            f"add_rms_norm: x {tuple(x.shape)} and delta {tuple(delta.shape)} must have one shape"
        )
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(total)
    width = x.shape[-1]
    rows, added = x.reshape(-1, width), delta.reshape(-1, width)
    _launch_norm(rows, added, weight, total, y, eps, offset, add=True)
    return total, y


def _launch_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    total: Tensor,
    y: Tensor,
    eps: float,
    offset: float,
    *,
    add: bool,
) -> None:
    if x.numel() == 0:
        return
    width = x.shape[1]
    config = _norm(width, add=add, wide=aligned(x, delta, weight))
    rms_norm_kernel[(x.shape[0],)](
        x, delta, weight, total, y, eps, offset, x.stride(0), delta.stride(0), **config.keywords
    )


def launch_silu_mul(x: Tensor) -> Tensor:
    """silu_mul; see silu_mul.py."""
    rows = x.reshape(-1, x.shape[-1])
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (rows.shape[0], triton.cdiv(width, GATE_BLOCK))
        silu_mul_kernel[grid](rows, y, width, rows.stride(0), **_gate(aligned(rows, y)).keywords)
    return y


def launch_rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """rotary_; see rotary.py. Raises ValueError where the shapes do not fit together."""
    for x in (q, k):
        fits = x.dim() == 3 and x.shape[0] == cos.shape[0] and cos.shape[1] <= x.shape[2]
        if not fits or cos.shape != sin.shape or cos.shape[1] % 2:
            raise ValueError(
                f"rotary: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and sin "
                f"{tuple(sin.shape)} do not fit together"
            )
    if not q.shape[0]:
        return
    half = cos.shape[1] // 2
    parts = triton.cdiv(q.shape[1], ROTARY_HEADS) + triton.cdiv(k.shape[1], ROTARY_HEADS)
    rotary_kernel[(q.shape[0], parts)](
        q, k, cos, sin, q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        cos.stride(0), sin.stride(0), **_rotary(half, wide=aligned(q, k, cos, sin)).keywords
    )  # fmt: skip


def _norm(width: int, *, add: bool, wide: bool) -> LaunchConfig:
    block = triton.next_power_of_2(width)
    # 8 elements a lane or more, also of 64 lanes: loads of 16 bytes
    warps = min(16, max(1, block // 512))
    return LaunchConfig({"K": width, "BLOCK": block, "ADD": add, "ALIGNED": wide}, warps)


def _gate(wide: bool) -> LaunchConfig:
    return LaunchConfig({"BLOCK": GATE_BLOCK, "ALIGNED": wide}, num_warps=4)


def _rotary(half: int, *, wide: bool) -> LaunchConfig:
    block = triton.next_power_of_2(half)
    constants = {"HALF": half, "BLOCK": block, "HEADS": ROTARY_HEADS, "ALIGNED": wide}
    return LaunchConfig(constants, num_warps=4)


def norm_compilations_for(
    width: int, dtype: torch.dtype, *, wide: bool | None = None
) -> Iterator[Compilation]:
    """All that rms_norm and add_rms_norm launch. wide: `aligned` of rows; None: as the width is."""
    wide = width * dtype.itemsize % WIDE == 0 if wide is None else wide
    row = pointer(dtype)
    types = dict.fromkeys(("x", "delta", "weight", "total", "y"), row)
    types |= {"eps": "fp32", "offset": "fp32", "stride_x": "i32", "stride_delta": "i32"}
    for add in (False, True):
        yield _norm(width, add=add, wide=wide).compilation(
            f"{'add_' if add else ''}rms_norm {width}{'' if wide else ', odd'}, {row[1:]}",
            rms_norm_kernel,
            types,
        )


def gate_compilations_for(width: int, dtype: torch.dtype) -> Iterator[Compilation]:
    """All that silu_mul launches for a gate of `width` columns."""
    wide, row = width * dtype.itemsize % WIDE == 0, pointer(dtype)
    yield _gate(wide).compilation(
        f"silu_mul{'' if wide else ', odd'}, {row[1:]}",
        silu_mul_kernel,
        {"x": row, "y": row, "I": "i32", "stride_x": "i32"},
    )


def rotary_compilations_for(
    width: int, dtype: torch.dtype, *, wide: bool | None = None
) -> Iterator[Compilation]:
    """All that rotary_ launches. width: columns that are rotated. wide: as for norms, of heads."""
    wide = width * dtype.itemsize % WIDE == 0 if wide is None else wide
    row, names = pointer(dtype), [arg for arg in rotary_kernel.arg_names if arg.islower()]
    types = {name: row if name in ("q", "k", "cos", "sin") else "i32" for name in names}
    yield _rotary(width // 2, wide=wide).compilation(
        f"rotary {width}{'' if wide else ', odd'}, {row[1:]}", rotary_kernel, types
    )


def compilations() -> Iterator[Compilation]:
    """Configurations for the widths of Llama-3.1-8B, and of 70B in bfloat16."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from norm_compilations_for(4096, dtype)
        yield from gate_compilations_for(14336, dtype)
        yield from rotary_compilations_for(128, dtype)
    yield from norm_compilations_for(8192, torch.bfloat16)
