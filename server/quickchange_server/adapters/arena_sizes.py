"""Sizes of the adapters' arena and of the tables over it, and how many adapters they hold.

Numbers only: the same for a pool that is made and for one that is planned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quickchange_kernels.lowrank.lowrank_contract import A_ALIGNMENT
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.adapters.packing import page_shapes
from quickchange_server.adapters.slab_allocator import SlabAllocator, slab_size

SETTING = "adapter_device_bytes"
_SLAB_BYTES = 1 << 20
# The directory may take so much of the budget, or as many bytes, and the page table's rows beyond
# those of whole pages as much: gains are short, so an arena full of them would need many more.
_TABLE_SHARE = 64
_SMALL_DIRECTORY = 1 << 20
_LEAST_SLOTS = 256
_ROW_BYTES = 96  # of the page table and the heads'


@dataclass(frozen=True, slots=True)
class ArenaSizes:
    """Sizes in elements of the arena's dtype, where nothing else is said."""

    span: int
    slab: int
    slots: int  # rows of the directory: adapters on the device
    rows: int  # of the page table: pages on the device
    table_bytes: int

    @classmethod
    def of(cls, groups: Sequence[ModuleGroup], budget: int, dtype: torch.dtype) -> ArenaSizes:
        """The sizes of an arena of `budget` bytes.

        Raises ValueError, naming the setting, if the largest page does not fit.
        """
        least, span = least_arena(groups, dtype), budget // dtype.itemsize
        if not groups or budget < least:
            raise ValueError(
                f"{SETTING} ({budget} bytes) is less than one page of 8 ranks of the model's "
                f"largest module ({least} bytes): raise it"
            )
        shapes = page_shapes(groups, dtype)
        sizes = {shape.elements for shape in shapes.values()}
        # Rare pages (gains, updates behind sub-layers and norms) do not count in the slab size.
        usual = {
            shape.elements
            for (_, source), shape in shapes.items()
            if source == "input" and shape.heads is None
        }
        slab = max(slab_size(usual, span, _SLAB_BYTES // dtype.itemsize), *sizes)
        unit = A_ALIGNMENT // dtype.itemsize  # pages and slabs begin at multiples of it
        short = min(shape.gain_elements for shape in shapes.values() if shape.heads is None)
        share, listed = budget // _TABLE_SHARE, 8 * len(groups)
        slots = min(max(share, _SMALL_DIRECTORY) // listed, span // short)
        slots = max(_LEAST_SLOTS, slots)
        rows = span // min(usual) + min(share // _ROW_BYTES, span // short) + 1
        return cls(span, slab // unit * unit, slots, rows, slots * listed + rows * _ROW_BYTES)

    def room_for(self, pages: Mapping[int, int]) -> int:
        """Number of adapters of these pages (by size) that have room, where nothing else is."""
        most = min(self.slots, self.rows // sum(pages.values())) if pages else self.slots
        space = SlabAllocator(self.span, self.slab)

        def too_many(count: int) -> bool:
            return not space.fits({size: n * count for size, n in pages.items()}, ())

        return bisect_left(range(1, most + 1), True, key=too_many)


def least_arena(groups: Sequence[ModuleGroup], dtype: torch.dtype) -> int:
    """Bytes of the largest page: an arena must hold it."""
    shapes = page_shapes(groups, dtype).values()
    return max((shape.elements for shape in shapes), default=0) * dtype.itemsize
