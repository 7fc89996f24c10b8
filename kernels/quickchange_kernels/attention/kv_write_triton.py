"""kv_write_ on the GPU: one program writes a row's keys and values of some heads into its slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.attention.head_operands import aligned_elements, aligned_heads, is_aligned
from quickchange_kernels.compilation import Compilation


@triton.jit(
    do_not_specialize=["total_slots", "k_row", "k_head", "v_row", "v_head"],
    do_not_specialize_on_alignment=["slots"],
)
def kv_write_kernel(
    # pointers
    k,
    v,
    k_cache,
    v_cache,
    slots,
    # sizes
    total_slots,
    # strides
    k_row,  # in units of ALIGN elements, v_row and v_head of ALIGN_V
    k_head,
    v_row,
    v_head,
    # meta
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_V: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program (row, block of heads) writes one row's keys and values."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if (slot < 0) | (slot >= total_slots):  # -1: padding
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    place = (slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE
    d = tl.arange(0, BLOCK_D)[None, :]
    live = (head < KV_HEADS) & (d < D)
    keys = tl.load(k + ((row * k_row + head * k_head) * ALIGN + d), mask=live)
    tl.store(k_cache + place * D + d, keys, mask=live)
    d = tl.arange(0, BLOCK_DV)[None, :]
    live = (head < KV_HEADS) & (d < DV)
    values = tl.load(v + ((row * v_row + head * v_head) * ALIGN_V + d), mask=live)
    tl.store(v_cache + place * DV + d, values, mask=live)


def launch_kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """kv_write_; see kv_write.py. Raises TypeError or ValueError on what does not fit together."""
    _check(k, v, k_cache, v_cache, slots)
    blocks, heads, page, dim = k_cache.shape
    if len(slots) == 0:
        return
    k, v = aligned_heads(k), aligned_heads(v)
    constants = _constants(heads, dim, v_cache.shape[3], page, k.itemsize)
    align, align_v = constants["ALIGN"], constants["ALIGN_V"]
    kv_write_kernel[(len(slots), triton.cdiv(heads, constants["BLOCK_HEADS"]))](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        blocks * page,
        k.stride(0) // align,
        k.stride(1) // align,
        v.stride(0) // align_v,
        v.stride(1) // align_v,
        **constants,
        num_warps=_WARPS,
        num_stages=1,
    )


_WARPS = 4
_BLOCK = 4096  # elements that a program holds


def _constants(heads: int, dim: int, value_dim: int, page: int, itemsize: int) -> dict[str, Any]:
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    most_heads = max(1, _BLOCK // max(block_d, block_dv))
    return {
        "KV_HEADS": heads,
        "D": dim,
        "DV": value_dim,
        "PAGE": page,
        "ALIGN": aligned_elements(dim, itemsize),
        "ALIGN_V": aligned_elements(value_dim, itemsize),
        "BLOCK_HEADS": min(triton.next_power_of_2(heads), most_heads),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
    }


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        raise TypeError(f"kv_write: slots must be contiguous int64, not {slots.dtype}")
    if not (k.dtype == v.dtype == k_cache.dtype == v_cache.dtype):
        raise TypeError(
            f"kv_write: k is {k.dtype} and v {v.dtype}, but the caches are {k_cache.dtype} and "
            f"{v_cache.dtype}; all must be equal"
        )
    fits = (
        (k_cache.dim(), v_cache.dim()) == (4, 4)
        and k_cache.shape[:3] == v_cache.shape[:3]
        and k.shape == (slots.numel(), k_cache.shape[1], k_cache.shape[3])
        and v.shape == (slots.numel(), k_cache.shape[1], v_cache.shape[3])
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and is_aligned(k_cache)
        and is_aligned(v_cache)
    )
    if not fits:
        raise ValueError(
            f"kv_write: k {list(k.shape)}, v {list(v.shape)}, k_cache {list(k_cache.shape)}, "
            f"v_cache {list(v_cache.shape)} (both contiguous, from a multiple of 16 bytes) and "
            f"slots {list(slots.shape)} do not fit together"
        )


def compilations() -> Iterator[Compilation]:
    """Configurations for the key heads of Llama 8B and 70B, SmolLM2 and DeepSeek V3."""
    shapes = {"Llama": (8, 128, 128), "SmolLM2": (3, 64, 64), "DeepSeek V3": (128, 192, 128)}
    for model, shape in shapes.items():
        yield compilation(model, *shape, page=16, dtype="bf16")
    for dtype in ("fp16", "fp32"):
        yield compilation("Llama", *shapes["Llama"], page=16, dtype=dtype)


def compilation(
    model: str, kv_heads: int, dim: int, value_dim: int, *, page: int, dtype: str
) -> Compilation:
    """The one kernel that any batch needs for a shape. dtype: as Triton names it."""
    integers = ("total_slots", "k_row", "k_head", "v_row", "v_head")
    return Compilation(
        name=f"kv_write, {model}, {dtype}",
        kernel=kv_write_kernel,
        signature=dict.fromkeys(("k", "v", "k_cache", "v_cache"), f"*{dtype}")
        | {"slots": "*i64"}
        | dict.fromkeys(integers, "i32"),
        constants=_constants(kv_heads, dim, value_dim, page, 4 if dtype == "fp32" else 2),
        num_warps=_WARPS,
        num_stages=1,
    )
