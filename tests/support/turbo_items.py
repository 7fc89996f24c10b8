"""Random matrices of Turbo heads and rows for the tests of turbo_heads, with NaN where nothing may
be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadItems, HeadTables, in_pages

NAN = float("nan")
# (row, matrix): matrices of 3, 1, 2 rows, in mixed order; rows with 3 matrices, 1 and none;
# matrix 3 unused
MIXED = [(4, 1), (1, 0), (1, 2), (6, 0), (1, 4), (4, 0), (6, 4)]


def random_heads(
    count: int, width: int, features: int, dtype: torch.dtype, generator: torch.Generator
) -> HeadTables:
    """`count` matrices [width, features], their pages in any order, with gaps between them."""
    pages = torch.cat(
        [
            in_pages(
                torch.randn(width, features, generator=generator) * features**-0.5,
                torch.randn(width, generator=generator),
            )
            for _ in range(count)
        ]
    )
    align = 64 // dtype.itemsize
    room = -(-pages.shape[1] // align) * align + align
    places = torch.randperm(len(pages), generator=generator)
    arena = torch.full((len(pages), room), NAN)
    arena[places, : pages.shape[1]] = pages
    each = len(pages) // count
    edges = torch.arange(count + 1, dtype=torch.int32) * each
    matrices = torch.stack([edges[:-1], edges[1:]], dim=1)
    return HeadTables(aligned(arena.flatten().to(dtype)), places * room, matrices)


def aligned(values: Tensor) -> Tensor:
    """A copy that begins at a multiple of 64 bytes."""
    spare = 64 // values.itemsize
    room = torch.empty(values.numel() + spare, dtype=values.dtype)
    skip = -(room.data_ptr() // values.itemsize) % spare
    return room[skip : skip + values.numel()].copy_(values)


def random_rows(
    wanted: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Strided rows [T, width]; those that no item names are NaN."""
    rows = max((row for row, _ in wanted), default=0) + 2
    x = torch.full((rows, width + 5), NAN, dtype=dtype)[:, 5:]
    for row in {row for row, _ in wanted}:
        x[row] = (torch.randn(width, generator=generator) * 2).to(dtype)
    return x


def with_padding(items: HeadItems) -> HeadItems:
    """The same with an empty segment before and after."""
    ends = torch.tensor([[0, 0, 2**30]], dtype=torch.int32)
    return HeadItems(items.items, torch.cat([ends, items.segments, ends]))
