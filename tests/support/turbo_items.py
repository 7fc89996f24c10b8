"""Random Turbo heads and rows for the tests of turbo_heads, with NaN where nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickchange_kernels.turbo_heads import HeadItems, HeadTables

NAN = float("nan")
# (row, head): heads of 3, 1, 2 rows, in mixed order; rows with 3 heads, 1 and none; head 3 unused
MIXED = [(4, 1), (1, 0), (1, 2), (6, 0), (1, 4), (4, 0), (6, 4)]


def random_heads(
    count: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> HeadTables:
    """`count` heads in an arena with gaps between what they hold."""
    align = 64 // dtype.itemsize
    chunks, offsets, end = [torch.full((align,), NAN)], [], align
    for _ in range(count):
        weight = torch.randn(width * width, generator=generator) * width**-0.5
        bias = torch.randn(width, generator=generator)
        gap = -(width * width + width) % align + align
        offsets.append((end, end + width * width))
        chunks += [weight, bias, torch.full((gap,), NAN)]
        end += width * width + width + gap
    return HeadTables(_aligned(torch.cat(chunks).to(dtype)), torch.tensor(offsets).view(-1, 2))


def _aligned(values: Tensor) -> Tensor:
    """A copy that begins at a multiple of 64 bytes."""
    spare = 64 // values.itemsize
    room = torch.empty(values.numel() + spare, dtype=values.dtype)
    skip = -(room.data_ptr() // values.itemsize) % spare
    return room[skip : skip + values.numel()].copy_(values)


def random_rows(
    wanted: Sequence[tuple[int, int]], width: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Strided rows [T, H]; those that no item names are NaN."""
    rows = max((row for row, _ in wanted), default=0) + 2
    x = torch.full((rows, width + 5), NAN, dtype=dtype)[:, 5:]
    for row in {row for row, _ in wanted}:
        x[row] = (torch.randn(width, generator=generator) * 2).to(dtype)
    return x


def with_padding(items: HeadItems) -> HeadItems:
    """The same with an empty segment before and after."""
    ends = torch.tensor([[0, 0, 2**30]], dtype=torch.int32)
    return HeadItems(items.items, torch.cat([ends, items.segments, ends]))
