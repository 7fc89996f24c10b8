"""Tiles, splits and launches of attention's Triton kernels: pure functions of shape and device.

Chosen by what the compilers for sm_80, sm_90, sm_100 and gfx942 say of registers, shared memory and
load widths. Splits have a fixed size, so that the order of a row's sums follows from its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MAX_SPLIT_QUERIES = 64  # a longer chunk of a sequence goes over its whole context in one
KEYS_PER_SPLIT = 512
MAX_SPLITS = 32  # for a wider block table the splits grow instead, by powers of two
ANY_COUNT = 2**30  # no bound on the number of queries or keys


@dataclass(frozen=True)
class Tiling:
    """Tile size and pipeline of one launch."""

    rows: int  # query rows of a tile
    keys: int  # keys of one step
    num_warps: int
    num_stages: int
    options: dict[str, Any]  # for NVIDIA's compiler


@dataclass(frozen=True)
class AttentionLaunch:
    """One launch, for the sequences with `least` to `most` queries."""

    least: int
    most: int
    split: bool
    tiling: Tiling


def tiling_for(rows: int, dim: int, value_dim: int, itemsize: int, few_registers: bool) -> Tiling:
    """Tile and pipeline for `rows` query rows of heads with keys and values of these sizes.

    Two stages of keys and values take at most 64 KiB of shared memory, which is all that CDNA has;
    where 16 keys need more there is one stage.
    few_registers: the products' results lie in registers beside their operands (sm_80 to sm_89),
    where a tile of 128 rows by 64 keys spills. Elsewhere tiles of 8 warps state how many registers
    a thread may have: for sm_100 the compiler hopes for two programs on an SM otherwise, takes 128
    and spills.
    """
    bytes_per_key = (sum(blocks_of(dim)) + padded(value_dim)) * itemsize
    room = power_of_two(2**15 // bytes_per_key + 1) // 2  # a power of two
    keys = max(16, min(32 if few_registers and rows > 64 else 64, room))
    warps = 4 if rows < 64 else 8
    options = {"maxnreg": 255} if warps == 8 and not few_registers else {}
    num_stages = 2 if 2 * keys * bytes_per_key <= 2**16 else 1
    return Tiling(rows, keys, warps, num_stages, options)


def launches_for(
    T: int,
    B: int,
    group: int,
    dim: int,
    value_dim: int,
    itemsize: int,
    few_registers: bool,
) -> list[AttentionLaunch]:
    """The launches that cover every way in which T rows may be shared by B sequences.

    With no more rows than sequences, which is what decoding looks like, small tiles take them all.
    """

    def tiling(rows: int) -> Tiling:
        rows = max(rows, power_of_two(group))
        return tiling_for(rows, dim, value_dim, itemsize, few_registers)

    widest = max(dim, value_dim)
    some = 64 if widest <= 256 else 16  # wider results of more rows don't fit the registers

    few = MAX_SPLIT_QUERIES if T <= B else max(1, 16 // group)
    launches = [
        AttentionLaunch(1, few, True, tiling(16)),
        AttentionLaunch(few + 1, MAX_SPLIT_QUERIES, True, tiling(some)),
        AttentionLaunch(
            MAX_SPLIT_QUERIES + 1, ANY_COUNT, False, tiling(128 if widest <= 128 else some)
        ),
    ]
    return [launch for launch in launches if launch.least <= min(T, launch.most)]


def has_few_registers(device: torch.device) -> bool:
    """True for NVIDIA GPUs before sm_90; see `tiling_for`."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] < 9


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def padded(dim: int) -> int:
    """Head size padded for a tile: a power of two, 16 at least, as matrix products need."""
    return max(16, power_of_two(dim))


def blocks_of(dim: int) -> tuple[int, int]:
    """A head size as the widths of two tiles, the second 0 where one is enough: 192 is 128 and 64.

    Few columns behind a power of two would fill a tile of twice its width by less than a half.
    """
    if dim <= 16 or dim == power_of_two(dim):
        return padded(dim), 0
    first = power_of_two(dim) // 2
    return first, padded(dim - first)


def keys_per_split_for(keys: int) -> int:
    """Keys of one split where block tables have room for `keys`: a constant up to 16,384."""
    return KEYS_PER_SPLIT * power_of_two(-(-keys // (KEYS_PER_SPLIT * MAX_SPLITS)))


def kernel_constants(
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    page: int,
    tiling: Tiling,
    **switches: bool,
) -> dict[str, Any]:
    """The constexpr arguments of `paged_attention_kernel`. switches: WINDOW, SOFTCAP, SPLIT."""
    block, rest = blocks_of(dim)
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "D": dim,
        "DV": value_dim,
        "PAGE": page,
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_KEYS": tiling.keys,
        "BLOCK_D": block,
        "BLOCK_REST": rest,
        "BLOCK_DV": padded(value_dim),
        **switches,
    }


def merge_constants(heads: int, value_dim: int, splits: int, window: bool) -> dict[str, Any]:
    """The constexpr arguments of `merge_splits_kernel`."""
    return {
        "HEADS": heads,
        "DV": value_dim,
        "BLOCK_DV": padded(value_dim),
        "BLOCK_SPLITS": power_of_two(splits),
        "WINDOW": window,
    }
