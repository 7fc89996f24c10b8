"""kv_move_ on the GPU: a launch gathers the rows out of the cache, and one of kv_write_ puts them
where they go, so that every source is read before any slot is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.kv_write_triton import launch_kv_write_

_WARPS = 4


@triton.jit
def kv_gather_kernel(
    k_cache,  # [num_blocks, KV_HEADS, PAGE, D]
    v_cache,
    source,  # int64 [M]
    target,  # int64 [M]
    rows,  # [2, M, KV_HEADS, D]: keys, values
    # sizes
    total_slots,
    # meta
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (row,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(source + row)
    if (slot < 0) | (slot >= total_slots) | (tl.load(target + row) < 0):  # padding
        return
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    live = (head < KV_HEADS) & (d < D)
    at = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D + d
    to = (row * KV_HEADS + head) * D + d
    values = rows + tl.num_programs(0).to(tl.int64) * (KV_HEADS * D)
    tl.store(rows + to, tl.load(k_cache + at, mask=live), mask=live)
    tl.store(values + to, tl.load(v_cache + at, mask=live), mask=live)


def launch_kv_move_(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """kv_move_; see there. Raises ValueError on what does not fit together."""
    fits = (
        k_cache.dim() == 4
        and k_cache.shape == v_cache.shape
        and k_cache.dtype == v_cache.dtype
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and source.dtype == target.dtype == torch.int64
        and source.dim() == 1
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
    )
    if not fits:
        raise ValueError(
            f"kv_move: k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)} (both "
            f"contiguous), source {list(source.shape)} and target {list(target.shape)} (both "
            "int64) do not fit together"
        )
    blocks, heads, page, dim = k_cache.shape
    if source.numel() == 0 or k_cache.numel() == 0:
        return
    rows = torch.empty(2, len(source), heads, dim, dtype=k_cache.dtype, device=k_cache.device)
    kv_gather_kernel[(len(source),)](
        k_cache, v_cache, source, target, rows, blocks * page,
        **_constants(heads, dim, page),
        num_warps=_WARPS,
    )  # fmt: skip
    launch_kv_write_(rows[0], rows[1], k_cache, v_cache, target)


def _constants(heads: int, dim: int, page: int) -> dict[str, Any]:
    return {
        "KV_HEADS": heads,
        "D": dim,
        "PAGE": page,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_D": triton.next_power_of_2(dim),
    }


def compilations() -> Iterator[Compilation]:
    """For the key heads of Llama 8B and 70B, and of SmolLM2."""
    for model, heads, dim in (("Llama", 8, 128), ("SmolLM2", 3, 64)):
        yield Compilation(
            name=f"kv_move, {model}",
            kernel=kv_gather_kernel,
            signature={
                "k_cache": "*bf16", "v_cache": "*bf16", "source": "*i64", "target": "*i64",
                "rows": "*bf16", "total_slots": "i32",
            },
            constants=_constants(heads, dim, 16),
            num_warps=_WARPS,
            num_stages=1,
            divisible_by_16=("total_slots",),
        )  # fmt: skip
