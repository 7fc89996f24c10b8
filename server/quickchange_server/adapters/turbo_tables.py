"""Tables over the Turbo heads' pages in the arena, and the heads that each slot can draft with.

The pages themselves lie in the arena beside those of the updates; DevicePool allocates, fills and
frees them. Everything runs on the engine's thread, between steps. The tables never grow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadTables
from quickchange_server.adapters.slab_allocator import RunAllocator
from quickchange_server.adapters.turbo_packing import HeadLayout


@dataclass(frozen=True, slots=True)
class TurboSlot:
    """Turbo heads of the adapter in one slot. Matrices are numbered as in HeadTables."""

    heads: tuple[tuple[int, ...], ...]  # matrices of each head's blocks, in order
    sequential: bool
    outputs: tuple[int, ...]  # matrices of own LM heads, one per head, or none
    columns: int | None  # tokens to choose from; None: those of the base's LM head
    vocabulary: Tensor | None  # int32 [columns] on the device; None: token i is column i

    @property
    def depth(self) -> int:
        """Number of heads: tokens that they draft at once."""
        return len(self.heads)


@dataclass(frozen=True)
class _Holding:
    """Table rows of one slot."""

    pages: tuple[int, int]  # [begin, end)
    matrices: tuple[int, int]  # [begin, end)
    layout: HeadLayout
    offsets: npt.NDArray[np.int64]  # [P] of the heads' pages in the arena
    vocabulary: Tensor | None

    @cached_property
    def turbo(self) -> TurboSlot:
        layout, matrix = self.layout, self.matrices[0]
        return TurboSlot(
            heads=tuple(tuple(matrix + block for block in head) for head in layout.heads),
            sequential=layout.sequential,
            outputs=tuple(matrix + output for output in layout.outputs),
            columns=layout.columns,
            vocabulary=self.vocabulary,
        )


class HeadPool:
    """Tables of Turbo heads over one arena, which holds `pages` pages at most."""

    def __init__(self, arena: Tensor, pages: int) -> None:
        self._pages = RunAllocator(pages)
        self._matrices = RunAllocator(pages)  # one page each, at least
        self._holdings: dict[int, _Holding] = {}
        self._published: set[int] = set()
        self._tables = HeadTables(
            arena=arena,
            pages=torch.zeros(pages, dtype=torch.int64, device=arena.device),
            matrices=torch.zeros((pages, 2), dtype=torch.int32, device=arena.device),
        )

    @property
    def tables(self) -> HeadTables:
        """Tables for the coming step."""
        return self._tables

    def turbo(self, slot: int) -> TurboSlot | None:
        """The Turbo heads in a slot; None without heads, or until `publish`."""
        return self._holdings[slot].turbo if slot in self._published else None

    def add(self, slot: int, layout: HeadLayout, offsets: npt.NDArray[np.int64]) -> None:
        """Add a slot's heads. offsets [P]: places of their pages in the arena, in elements."""
        count = int(layout.matrices[-1, 1])  # the vocabulary's page is in no table
        page, matrix = self._pages.allocate(count), self._matrices.allocate(len(layout.matrices))
        if page is None or matrix is None:
            self._close_up()
            return self.add(slot, layout, offsets)
        held = _Holding(
            (page, page + count),
            (matrix, matrix + len(layout.matrices)),
            layout,
            offsets,
            self._vocabulary(layout, int(offsets[-1])),
        )
        self._holdings[slot] = held
        self._describe(held)
        return None

    def publish(self, slot: int) -> None:
        """Make a slot's heads visible: their pages have arrived. Ignored without heads."""
        if slot in self._holdings:
            self._published.add(slot)

    def remove(self, slot: int) -> None:
        """Give a slot's table rows back. Ignored without heads."""
        held = self._holdings.pop(slot, None)
        if held is not None:
            self._published.discard(slot)
            self._pages.free(held.pages[0], held.pages[1] - held.pages[0])
            self._matrices.free(held.matrices[0], held.matrices[1] - held.matrices[0])

    def check_integrity(self) -> None:
        """Raises AssertionError if rows of the tables are shared or lost."""
        self._pages.check_integrity(held.pages for held in self._holdings.values())
        self._matrices.check_integrity(held.matrices for held in self._holdings.values())
        assert self._published <= set(self._holdings), "heads that are not there"

    def _vocabulary(self, layout: HeadLayout, offset: int) -> Tensor | None:
        if layout.vocabulary is None:
            return None
        arena = self._tables.arena
        elements = -(-layout.vocabulary * torch.int32.itemsize // arena.dtype.itemsize)
        return arena[offset : offset + elements].view(torch.int32)

    def _describe(self, held: _Holding) -> None:
        """Write a slot's rows of both tables."""
        (page, end), tables = held.pages, self._tables
        tables.pages[page:end].copy_(torch.from_numpy(held.offsets[: end - page]))
        matrices = torch.from_numpy(held.layout.matrices + page)
        tables.matrices[slice(*held.matrices)].copy_(matrices)

    def _close_up(self) -> None:
        """Move all rows of both tables together, so that the free ones are one run."""
        held = sorted(self._holdings.items(), key=lambda item: item[1].pages)
        pages = self._pages.close_up([each.pages for _, each in held])
        held_pages = {slot: run for (slot, _), run in zip(held, pages, strict=True)}
        held.sort(key=lambda item: item[1].matrices)
        matrices = self._matrices.close_up([each.matrices for _, each in held])
        for (slot, each), run in zip(held, matrices, strict=True):
            moved = replace(each, pages=held_pages[slot], matrices=run)
            self._holdings[slot] = moved
            self._describe(moved)
