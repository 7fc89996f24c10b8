"""kv_write_: put this step's keys and values into their slots of the paged cache.

Contract
    k        [T, Hkv, D]   any strides
    v        [T, Hkv, Dv]  any strides
    k_cache  [num_blocks, Hkv, block_size, D]   contiguous, k's dtype; written in place
    v_cache  [num_blocks, Hkv, block_size, Dv]  contiguous, k's dtype; written in place
    slots    int64 [T]  block * block_size + offset; no slot twice; -1: padding, skipped
Slots not named are not touched. Any other slot out of range raises IndexError on a CPU; on a GPU it
must not occur, and is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.index_checks import check_indices

PADDING = -1  # the slot of a row that is written nowhere


def reference_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """The two caches after the write, as new tensors."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    block_size = k_cache.shape[2]
    for t, slot in enumerate(slots.tolist()):
        if slot == PADDING:
            continue
        k_cache[slot // block_size, :, slot % block_size] = k[t]
        v_cache[slot // block_size, :, slot % block_size] = v[t]
    return k_cache, v_cache


def plain_kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """The operation in plain torch, for any device."""
    kept = (slots != PADDING).nonzero().squeeze(1)
    k, v, slots = k[kept], v[kept], slots[kept]
    block_size = k_cache.shape[2]
    check_indices("kv_write: slots", slots, k_cache.shape[0] * block_size)
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


_kv_write_ = dispatch.declare(
    "kv_write_",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    plain_kv_write_,
    dispatch.writes_in_place,
)
dispatch.triton_version(
    "kv_write_", "quickchange_kernels.attention.kv_write_triton:launch_kv_write_"
)


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write k and v into their slots, on k's device. Contract above."""
    native.ensure()
    _kv_write_(k, v, k_cache, v_cache, slots)
