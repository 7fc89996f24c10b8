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

GATE_BLOCK = 2048  # columns of one program of silu_mul: eight a lane on 4 warps of 64
ROTARY_HEADS = 8  # heads of one program of rotary_


@triton.jit
def rms_norm_kernel(
    # pointers
    x,  # [T, K]
    delta,  # [T, K], not read unless ADD
    weight,  # [K]
    total,  # [T, K], not written unless ADD
    y,  # [T, K]
    # sizes
    K,
    # scalars
    eps,
    offset,
    # strides
    stride_x,
    stride_delta,
    # meta
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (row,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < K
    value = tl.load(x + row * stride_x + k, mask=live, other=0.0).to(tl.float32)  # stream
    if ADD:
        added = tl.load(delta + row * stride_delta + k, mask=live, other=0.0)  # stream
        rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * K + k, rounded, mask=live)
        value = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / K + eps)
    gain = tl.load(weight + k, mask=live, other=0.0).to(tl.float32) + offset  # stream
    tl.store(y + row * K + k, (value * factor * gain).to(y.dtype.element_ty), mask=live)


@triton.jit
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
):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < I
    gate = tl.load(x + row * stride_x + i, mask=live, other=0.0).to(tl.float32)  # stream
    up = tl.load(x + row * stride_x + I + i, mask=live, other=0.0).to(tl.float32)  # stream
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(y + row * I + i, (silu * up).to(y.dtype.element_ty), mask=live)


@triton.jit
def _rotate(x, cos, sin, first_head, heads, stride_head, HALF: tl.constexpr, BLOCK: tl.constexpr,
            HEADS: tl.constexpr):  # fmt: skip
    """Rotate some heads of one row, in place. x: its first head; cos, sin: its row of them."""
    head = first_head + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    live = (head < heads)[:, None] & (i < HALF)[None, :]
    place = x + head.to(tl.int64)[:, None] * stride_head + i[None, :]  # [HEADS, BLOCK]
    first = tl.load(place, mask=live, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    inside = i < HALF
    c1 = tl.load(cos + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(place, (first * c1 - second * s1).to(x.dtype.element_ty), mask=live)
    tl.store(place + HALF, (second * c2 + first * s2).to(x.dtype.element_ty), mask=live)


@triton.jit
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
):
    """Program (row, HEADS heads of q, then of k)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    cos_row = cos + row * stride_cos
    sin_row = sin + row * stride_sin
    if part < q_parts:
        _rotate(q + row * stride_q_row, cos_row, sin_row, part * HEADS, q_heads, stride_q_head,
                HALF, BLOCK, HEADS)  # fmt: skip
    else:
        _rotate(k + row * stride_k_row, cos_row, sin_row, (part - q_parts) * HEADS, k_heads,
                stride_k_head, HALF, BLOCK, HEADS)  # fmt: skip


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
    rms_norm_kernel[(x.shape[0],)](
        x, delta, weight, total, y, width, eps, offset, x.stride(0), delta.stride(0),
        BLOCK=triton.next_power_of_2(width), ADD=add, num_warps=_norm_warps(width),
    )  # fmt: skip


def launch_silu_mul(x: Tensor) -> Tensor:
    """silu_mul; see silu_mul.py."""
    rows = x.reshape(-1, x.shape[-1])
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (rows.shape[0], triton.cdiv(width, GATE_BLOCK))
        silu_mul_kernel[grid](rows, y, width, rows.stride(0), BLOCK=GATE_BLOCK, num_warps=4)
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
        cos.stride(0), sin.stride(0), HALF=half, BLOCK=triton.next_power_of_2(half),
        HEADS=ROTARY_HEADS, num_warps=4,
    )  # fmt: skip


def _norm_warps(width: int) -> int:
    """Warps that leave each lane 8 elements or more, also of 64 lanes: loads of 16 bytes."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def compilations() -> Iterator[Compilation]:
    """Configurations in bfloat16 for the widths of Llama-3.1-8B and 70B."""
    bf16 = "*bf16"
    for hidden in (4096, 8192):
        for add in (False, True):
            yield Compilation(
                name=f"{'add_' if add else ''}rms_norm {hidden}, bf16",
                kernel=rms_norm_kernel,
                signature={
                    "x": bf16, "delta": bf16, "weight": bf16, "total": bf16, "y": bf16, "K": "i32",
                    "eps": "fp32", "offset": "fp32", "stride_x": "i32", "stride_delta": "i32",
                },
                constants={"BLOCK": hidden, "ADD": add},
                num_warps=_norm_warps(hidden),
                num_stages=1,
                divisible_by_16=("K", "stride_x", "stride_delta"),
            )  # fmt: skip
    yield Compilation(
        name="silu_mul, bf16",
        kernel=silu_mul_kernel,
        signature={"x": bf16, "y": bf16, "I": "i32", "stride_x": "i32"},
        constants={"BLOCK": GATE_BLOCK},
        num_warps=4,
        num_stages=1,
        divisible_by_16=("I", "stride_x"),
    )
    yield Compilation(
        name="rotary 128, bf16",
        kernel=rotary_kernel,
        signature={
            "q": bf16, "k": bf16, "cos": bf16, "sin": bf16, "q_heads": "i32", "k_heads": "i32",
            "stride_q_row": "i32", "stride_q_head": "i32", "stride_k_row": "i32",
            "stride_k_head": "i32", "stride_cos": "i32", "stride_sin": "i32",
        },
        constants={"HALF": 64, "BLOCK": 64, "HEADS": ROTARY_HEADS},
        num_warps=4,
        num_stages=1,
        divisible_by_16=("stride_q_row", "stride_q_head", "stride_k_row", "stride_k_head",
                         "stride_cos", "stride_sin"),
    )  # fmt: skip
