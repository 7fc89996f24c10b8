"""kv_move_: move keys and values from slot to slot of the paged cache.

After a tree of drafts was verified, the rows of its accepted path are moved together, so that the
sequence's keys lie one after another again.

Contract
    k_cache, v_cache   [num_blocks, Hkv, block_size, D]  contiguous, of one dtype; in place
    source, target     int64 [M]  block * block_size + offset; no target twice; where the target is
                       -1 nothing is moved and the source is not read
Sources may be targets of other moves: all are read before any slot is written. Any other slot out
of range raises IndexError on a CPU; on a GPU it must not occur, and is skipped.
"""

from __future__ import annotations

from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.kv_write import PADDING


def reference_kv_move(
    k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The two caches after the moves, as new tensors."""
    block_size = k_cache.shape[2]
    moved = k_cache.clone(), v_cache.clone()
    for before, after in zip((k_cache, v_cache), moved, strict=True):
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            if b != PADDING:
                row = before[a // block_size, :, a % block_size]
                after[b // block_size, :, b % block_size] = row
    return moved


def plain_kv_move_(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """The operation in plain torch, for any device."""
    kept = (target != PADDING).nonzero().squeeze(1)
    source, target = source[kept], target[kept]
    block_size = k_cache.shape[2]
    for cache in (k_cache, v_cache):
        held = cache[source // block_size, :, source % block_size]
        cache[target // block_size, :, target % block_size] = held


_kv_move_ = dispatch.declare(
    "kv_move_",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor source, Tensor target) -> ()",
    plain_kv_move_,
    dispatch.writes_in_place,
)
dispatch.triton_version("kv_move_", "quickchange_kernels.kv_move_triton:launch_kv_move_")


def kv_move_(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """The operation on the caches' device. Contract above; raises ValueError where the operands do
    not fit together."""
    native.ensure()
    _kv_move_(k_cache, v_cache, source, target)
