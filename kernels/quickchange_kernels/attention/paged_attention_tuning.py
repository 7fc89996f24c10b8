"""Tiles, splits and launches of attention's Triton kernels: pure functions of shape and target.

Chosen by what the compilers for gpu_targets.py's targets say of registers, shared memory and load
widths.

Splits. A sequence with few queries has its keys cut in splits, so that many programs share them.
How long a split is follows from the sequence's own length and number of queries, never from the
block table's width or from the other sequences: a constant, and longer only where there would be
more than `most` of them. `most` falls with the number of key heads, each of which has programs of
its own, and with the number of queries, so that a sequence has room for a fixed number of partial
results whatever its queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quickchange_kernels.attention.head_operands import aligned_elements
from quickchange_kernels.gpu_targets import KIB, Target

MAX_SPLIT_QUERIES = 64  # a longer chunk of a sequence goes over its whole context in one
ANY_COUNT = 2**30  # no bound on the number of queries
SPLIT_GRAIN = 64  # splits begin at multiples of it, from the first key on that a row may see
PROGRAMS = 2048  # of a launch: two or three times what a GPU holds at once
_REGISTERS = 65536  # of an SM, for all threads of its programs
_STAGES_BYTES = 64 * KIB  # all that CDNA has, and little enough for every other target


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


@dataclass(frozen=True)
class Splits:
    """The split of sequences of a model's shape."""

    keys: int  # of a split, unless there would be more than `most`
    most: int  # of a sequence
    room: int  # partial results of a sequence: its queries times its splits

    def reached(self, keys: int) -> int:
        """The most splits of a sequence whose rows see `keys` keys at most, together."""
        return max(1, min(self.most, -(-keys // self.keys)))

    def partials(self, T: int, B: int, reached: int) -> int:
        """Partial results, one of a row and a split, for which a launch needs room."""
        return min(T * reached, B * self.room)


def splits_for(kv_heads: int) -> Splits:
    """The splits of a model with so many key heads.

    One sequence of 4,096 keys has 128 programs or more, with any number of heads but one; the
    longest has about 256. All of them for up to four queries, fewer for each beyond.
    """
    most = min(64, max(4, power_of_two(256 // kv_heads)))
    keys = min(256, max(SPLIT_GRAIN, 16 * power_of_two(kv_heads + 1)))
    return Splits(keys, most, max(MAX_SPLIT_QUERIES, 4 * most))


def seen_keys(capacity: int, window: int) -> int:
    """Keys that the rows of a split sequence may see together. capacity: of its blocks."""
    if window == 0:
        return capacity
    return min(capacity, window + MAX_SPLIT_QUERIES + SPLIT_GRAIN)


def scratch_bytes(
    T: int, B: int, heads: int, kv_heads: int, value_dim: int, capacity: int, window: int = 0
) -> int:
    """Bytes of partial results that attention over T rows of B sequences takes beside its output.

    capacity: keys that a sequence's row of the block table has room for. One layer's at a time.
    """
    splits = splits_for(kv_heads)
    reached = splits.reached(seen_keys(capacity, window))
    return splits.partials(T, B, reached) * heads * (value_dim + 2) * 4


def programs_along(programs: int, most: int) -> int:
    """Size of a grid's last dimension, over `most` things that a program may also loop over.

    programs: of the grid's other dimensions. What a program computes for each thing is the same.
    """
    return max(1, min(most, power_of_two(PROGRAMS // programs + 1) // 2))


def tiling_for(rows: int, dim: int, value_dim: int, itemsize: int, target: Target) -> Tiling:
    """Tile and pipeline for `rows` query rows of heads with keys and values of these sizes.

    Two stages of keys and values take at most 64 KiB of shared memory; where 16 keys need more
    there is one stage. Where products leave their results in registers, a tile of 128 rows by 64
    keys spills. Products of float32 are exact, so no tensor core makes them, and their operands lie
    in registers too: smallest tiles and, but on CDNA's wide warps, many threads. For NVIDIA tiles
    state how many registers a thread may have: its compiler hopes for more programs on an SM
    otherwise, and spills. It is the other way round for the tile of 128 rows where results lie in
    registers.
    """
    bytes_per_key = (sum(blocks_of(dim)) + padded(value_dim)) * itemsize
    room = power_of_two(_STAGES_BYTES // 2 // bytes_per_key + 1) // 2  # a power of two
    crowded = target.products_in_registers and rows > 64
    keys = 16 if itemsize == 4 else max(16, min(32 if crowded else 64, room))
    warps = 4 if rows < 32 else 8
    if itemsize == 4 and target.lanes == 32:
        warps = 8 if max(dim, value_dim) <= 256 else 16
    num_stages = 2 if 2 * keys * bytes_per_key <= _STAGES_BYTES else 1
    told = target.backend == "cuda" and (not crowded or itemsize == 4 or blocks_of(dim)[1] > 0)
    options = {"maxnreg": min(255, _REGISTERS // (32 * warps))} if told else {}
    return Tiling(rows, keys, warps, num_stages, options)


def launches_for(
    T: int, B: int, group: int, dim: int, value_dim: int, itemsize: int, target: Target
) -> list[AttentionLaunch]:
    """The launches that cover every way in which T rows may be shared by B sequences.

    With no more rows than sequences, which is what decoding looks like, small tiles take them all.
    The tilings are `tilings`, whatever T and B.
    """
    small, medium, large = tilings(group, dim, value_dim, itemsize, target)
    few = MAX_SPLIT_QUERIES if T <= B else max(1, 16 // group)
    launches = [
        AttentionLaunch(1, few, True, small),
        AttentionLaunch(few + 1, MAX_SPLIT_QUERIES, True, medium),
        AttentionLaunch(MAX_SPLIT_QUERIES + 1, ANY_COUNT, False, large),
    ]
    return [launch for launch in launches if launch.least <= min(T, launch.most)]


def tilings(
    group: int, dim: int, value_dim: int, itemsize: int, target: Target
) -> tuple[Tiling, Tiling, Tiling]:
    """Tilings of a model's shape for few queries (split), for more (split), for many (not)."""
    widest = max(dim, value_dim)
    if widest > 256 or itemsize == 4:  # wider results of more rows don't fit the registers
        some = many = 16
    else:
        some, many = (64, 128) if widest <= 128 else (32, 64)

    def tiling(rows: int) -> Tiling:
        rows = max(rows, power_of_two(group))
        return tiling_for(rows, dim, value_dim, itemsize, target)

    return tiling(16), tiling(some), tiling(many)


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


def kernel_constants(
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    page: int,
    itemsize: int,
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
        "ALIGN": aligned_elements(dim, itemsize),
        "GRAIN": SPLIT_GRAIN,
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_KEYS": tiling.keys,
        "BLOCK_D": block,
        "BLOCK_REST": rest,
        "BLOCK_DV": padded(value_dim),
        **switches,
    }


def merge_constants(value_dim: int, window: bool) -> dict[str, Any]:
    """The constexpr arguments of `merge_splits_kernel`."""
    return {
        "DV": value_dim,
        "GRAIN": SPLIT_GRAIN,
        "BLOCK_DV": padded(value_dim),
        "BLOCK_SPLITS": max(4, min(16, 2048 // padded(value_dim))),
        "WINDOW": window,
    }
