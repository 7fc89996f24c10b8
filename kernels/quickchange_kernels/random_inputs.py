"""Random inputs of the operations, for tests and benchmarks, poisoned where nothing may be read.

Adapter popularity, the axis that decides how much of a batch shares weights, is defined here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_tables import (
    A_ALIGNMENT,
    RANKS_PER_PAGE,
    GroupShape,
    LowRankTables,
    PageKind,
    RowTiles,
    Segments,
    cut_tiles,
    rounded_to_power,
    tile_height,
)


def make_segments(
    spans: Sequence[tuple[int, int, int, float]], height: int | None = None
) -> Segments:
    """Segments of (begin, end, slot, weight), which may overlap in any way.

    height: the tiles' height, instead of the one that suits the spans.
    """
    slots = [span[2] for span in spans]
    edges = sorted({edge for span in spans for edge in span[:2]})
    parts = [
        (begin, end, [i for i, span in enumerate(spans) if span[0] <= begin and end <= span[1]])
        for begin, end in pairwise(edges)
    ]
    covered = [part for part in parts if part[2]]
    height = height or tile_height(max((end - begin for begin, end, _ in covered), default=0))
    pieces, tiles = cut_tiles(covered, slots, height)
    return Segments(
        rows=_int32([span[:2] for span in spans]).view(-1, 2),
        slot=_int32(slots),
        weight=torch.tensor([span[3] for span in spans], dtype=torch.float32),
        tiles=RowTiles(_int32(pieces).view(-1, 4), _int32(tiles).view(-1, 4), height),
    )


def _int32(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_tables(
    in_features: int,
    widths: Sequence[int],
    ranks: Sequence[int],
    generator: torch.Generator,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    kinds: Sequence[PageKind] = (PageKind.IDENTITY,),
) -> LowRankTables:
    """Adapters of the given ranks in slots 0, 1, ...; each updates every member of every group.

    widths: those of a group's members, side by side in its output. bias: one more rank, whose
    input is the constant 1. kinds: the pages' kinds, in turn.
    Pages lie in the arena in random order, with gaps of NaN between them.
    """
    align = A_ALIGNMENT // dtype.itemsize
    page_rows: list[tuple[int, int, int]] = []  # column, width, live ranks
    directory = torch.zeros(len(ranks), groups, 2, dtype=torch.int32)
    for slot, rank in enumerate(ranks):
        for group in range(groups):
            directory[slot, group, 0] = len(page_rows)
            for column, width in _places(widths):
                live = rank + bias
                page_rows += [
                    (column, width, min(RANKS_PER_PAGE, live - start))
                    for start in range(0, live, RANKS_PER_PAGE)
                ]
            directory[slot, group, 1] = len(page_rows)
    pages = torch.zeros(len(page_rows), 4, dtype=torch.int64)
    shift = torch.zeros(len(page_rows), RANKS_PER_PAGE)
    kind = _int32([kinds[page % len(kinds)] for page in range(len(page_rows))])
    chunks: list[Tensor] = []
    end = 0
    for page in torch.randperm(len(page_rows), generator=generator).tolist():
        column, width, live = page_rows[page]
        a = _page(live, in_features, in_features**-0.5, generator)
        b = _page(live, width, 1.0, generator)
        if bias and live < RANKS_PER_PAGE:
            a[live - 1] = 0
            shift[page, live - 1] = 1
        if kind[page] == PageKind.GAIN:
            a, b, shift[page] = a[:0], b[:1], 0
        start = (end // align + 1) * align  # something lies between any two pages
        b_start = -(-(start + a.numel()) // align) * align
        pages[page] = torch.tensor([start, b_start, column, width])
        chunks += [_nan(start - end), a.flatten(), _nan(b_start - start - a.numel()), b.flatten()]
        end = b_start + b.numel()
    chunks.append(_nan(align))
    return LowRankTables(
        arena=_aligned(torch.cat(chunks).to(dtype)),
        directory=directory,
        pages=pages,
        page_scale=torch.rand(len(page_rows), generator=generator) + 0.5,
        page_shift=shift,
        page_kind=kind,
        shapes=(_group_shape(in_features, widths, directory),) * groups,
    )


def _group_shape(in_features: int, widths: Sequence[int], directory: Tensor) -> GroupShape:
    pages = (directory[..., 1] - directory[..., 0]).max() if directory.numel() else torch.tensor(0)
    return GroupShape(
        most_pages=rounded_to_power(int(pages)),
        aligned=all(size % 8 == 0 for size in (in_features, *widths)),
    )


def _nan(count: int) -> Tensor:
    return torch.full((count,), float("nan"))


def _places(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(column, width) of members side by side."""
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _page(live: int, width: int, deviation: float, generator: torch.Generator) -> Tensor:
    page = torch.zeros(RANKS_PER_PAGE, width)
    page[:live] = torch.randn(live, width, generator=generator) * deviation
    return page


def _aligned(values: Tensor) -> Tensor:
    """A copy that begins at a multiple of 64 bytes."""
    spare = A_ALIGNMENT // values.itemsize
    room = torch.empty(values.numel() + spare, dtype=values.dtype)
    skip = -(room.data_ptr() // values.itemsize) % spare
    return room[skip : skip + values.numel()].copy_(values)


@dataclass(frozen=True)
class PagedKeys:
    """A paged cache that holds some sequences, in shuffled blocks. NaN wherever no key lies."""

    k_cache: Tensor  # [num_blocks, Hkv, block_size, D]
    v_cache: Tensor
    block_tables: Tensor  # int32 [B, M]; entries past a sequence's blocks are out of range
    seq_lens: Tensor  # int32 [B]


def random_keys(
    lengths: Sequence[int],
    heads: int,
    dim: int,
    block_size: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    value_dim: int | None = None,
) -> PagedKeys:
    """Random keys and values of sequences of the given lengths. value_dim: default as keys."""
    used = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(used) + 2, generator=generator).to(torch.int32)
    tables = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    k, v = (
        torch.full((len(blocks), heads, block_size, width), float("nan"), dtype=dtype)
        for width in (dim, dim if value_dim is None else value_dim)
    )
    for b, (length, count) in enumerate(zip(lengths, used, strict=True)):
        own = blocks[sum(used[:b]) : sum(used[:b]) + count]
        tables[b, :count] = own
        for i, block in enumerate(own.tolist()):
            live = min(block_size, length - i * block_size)
            for cache in (k, v):
                cache[block, :, :live] = torch.randn(
                    heads, live, cache.shape[3], generator=generator
                )
    return PagedKeys(k, v, tables, torch.tensor(lengths, dtype=torch.int32))
