"""Device memory of the adapters, counted in ranks: one arena of pages and the tables over it.

A page is 8 ranks of one module's update (packing.py), so rank 8 pays for 8 and rank 64 for 64 (a
gain for its own row alone), and a byte budget, not a number of slots, bounds how many adapters are
resident. A slot is an adapter's row in the tables' directory. An adapter's Turbo heads lie in pages
of the same arena, come and go with its slot, and have tables of their own (turbo_tables.py).

Everything but `write` runs on the engine's thread, between steps. A table that has to grow is
replaced, so that a running step that holds the old tables keeps valid data. Other changes are made
in place, in rows that no running step reads: those of slots that no batch refers to. `write` fills
arena pages only. Knows nothing of names, requests or eviction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import (
    A_ALIGNMENT,
    RANKS_PER_PAGE,
    GroupShape,
    LowRankTables,
)
from quickchange_kernels.lowrank.lowrank_tables import rounded_to_power
from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadTables
from quickchange_server.adapters.adapter_loader import Copies, Mark, copies_for
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.adapters.paced_copies import PIECE, Pause, no_pause
from quickchange_server.adapters.packing import AdapterImage, page_shapes
from quickchange_server.adapters.slab_allocator import Grant, RunAllocator, SlabAllocator, slab_size
from quickchange_server.adapters.turbo_tables import HeadPool, TurboSlot, enlarged
from quickchange_server.errors import AdapterFailedError

SETTING = "adapter_device_bytes"
_SLAB_BYTES = 1 << 20
# First sizes of the tables. A table that grows lies elsewhere, which voids the captured graphs that
# read it: so there is room for all pages of the smallest size, within reason.
_FIRST_SLOTS = 64
_MOST_FIRST_ROWS = 1 << 17
_USUAL_RANK = 16  # adapters of higher rank widen the kernels' grids when they first come


@dataclass(frozen=True)
class _Holding:
    """Pages and table rows of one slot."""

    grant: Grant  # its pages in the arena, in elements
    offsets: npt.NDArray[np.int64]  # [P] the same pages, in the image's order
    rows: tuple[int, int]  # [begin, end) in the page table
    ranges: npt.NDArray[np.int32]  # [groups, 2] its directory row, once published
    after: Mark  # steps given to the device later read none of the pages' old content


class DevicePool:
    """The arena of adapter pages and its tables."""

    def __init__(
        self,
        groups: Sequence[ModuleGroup],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        copies: Copies | None = None,
    ) -> None:
        """Take `budget_bytes` of device memory at once.

        copies: runs the copies to the device; None: those that suit it.
        Raises ValueError, naming the setting, if the largest page does not fit.
        """
        shapes = page_shapes(groups, dtype)
        sizes = {shape.elements for shape in shapes.values()}
        self.budget_bytes = budget_bytes
        self.dtype = dtype
        self.device = device
        span = budget_bytes // dtype.itemsize
        if not sizes or span < max(sizes):
            raise ValueError(
                f"{SETTING} ({budget_bytes} bytes) is less than one page of 8 ranks of the model's "
                f"largest module ({max(sizes, default=0) * dtype.itemsize} bytes): raise it"
            )
        self._groups = tuple(groups)
        self._copies = copies_for(device) if copies is None else copies
        # Rare pages (gains, updates behind sub-layers) do not count in the slab size.
        usual = {shape.elements for (_, source), shape in shapes.items() if source == "input"}
        slab = max(slab_size(usual, span, _SLAB_BYTES // dtype.itemsize), *sizes)
        unit = A_ALIGNMENT // dtype.itemsize  # pages and slabs begin at multiples of it
        self._space = SlabAllocator(span, slab // unit * unit)
        self._slots = RunAllocator(_FIRST_SLOTS)
        rows = min(span // min(usual), _MOST_FIRST_ROWS)
        self._rows = RunAllocator(rows)
        self._holdings: dict[int, _Holding] = {}
        self._tables = LowRankTables(
            # Not zeroed, so that on a CPU only pages in use take memory: `write` fills all of one.
            arena=torch.empty(span, dtype=dtype, device=device),
            directory=self._zeros(torch.int32, _FIRST_SLOTS, len(groups), 2),
            pages=self._zeros(torch.int64, rows, 4),
            page_scale=self._zeros(torch.float32, rows),
            page_shift=self._zeros(torch.float32, rows, RANKS_PER_PAGE),
            page_kind=self._zeros(torch.int32, rows),
            shapes=tuple(_usual_shape(group) for group in groups),
        )
        self._heads = HeadPool(self._tables.arena)

    @property
    def tables(self) -> LowRankTables:
        """Tables for the coming step. A slot's row is empty until `publish`."""
        return self._tables

    @property
    def heads(self) -> HeadTables:
        """Tables of all slots' Turbo heads, for the coming step."""
        return self._heads.tables

    def turbo(self, slot: int) -> TurboSlot | None:
        """The Turbo heads in a slot; None without heads, or until `publish`."""
        return self._heads.turbo(slot)

    def updates(self, slot: int, group: int) -> bool:
        """True if the adapter in a slot has an update in a module group."""
        begin, end = self._holdings[slot].ranges[group]
        return bool(begin < end)

    @property
    def slots(self) -> list[int]:
        """The slots in use, ascending."""
        return sorted(self._holdings)

    @property
    def used_bytes(self) -> int:
        return self._space.used * self.dtype.itemsize

    def fits(self, demand: Mapping[int, int], kept_slots: Iterable[int]) -> bool:
        """True if `demand` (pages by size) has room beside the pages of the kept slots alone."""
        return self._space.fits(demand, [self._holdings[slot].grant for slot in kept_slots])

    def allocate(self, image: AdapterImage) -> int | None:
        """Take a slot for the image, not visible yet; None if there is no room now.

        Raises AdapterFailedError, with both figures, for an image larger than the whole budget.
        """
        demand = image.demand
        if not self.fits(demand, ()):
            raise AdapterFailedError(too_large(image.nbytes, self.budget_bytes))
        grant = self._space.allocate(demand)
        if grant is None:
            return None
        slot, begin = self._slots.allocate(1), self._rows.allocate(image.pages)
        self._grow()
        rows, ranges = (begin, begin + image.pages), self._ranges(image, begin)
        offsets = _in_image_order(image, grant)
        holding = _Holding(grant, offsets, rows, ranges, self._copies.mark())
        self._holdings[slot] = holding
        self._describe_pages(image, holding)
        if image.heads is not None:
            self._heads.add(slot, image.heads, offsets[image.pages :])
        return slot

    def write(self, slot: int, image: AdapterImage, pause: Pause = no_pause) -> None:
        """Copy the image to the slot's pages and wait for its arrival. On any thread."""
        holding = self._holdings[slot]
        self._copies.run(holding.after, lambda: self._copy_pages(image, holding.offsets, pause))

    def publish(self, slot: int) -> None:
        """Make a written slot visible to the steps from now on."""
        ranges = torch.from_numpy(self._holdings[slot].ranges)
        self._tables.directory[slot].copy_(ranges)
        self._widen(self._holdings[slot].ranges)
        self._heads.publish(slot)

    def free(self, slot: int) -> None:
        """Give the slot and its pages back. No later step may refer to it."""
        holding = self._holdings.pop(slot)
        self._heads.remove(slot)
        self._tables.directory[slot].zero_()
        begin, end = holding.rows
        self._rows.free(begin, end - begin)
        self._slots.free(slot, 1)
        self._space.free(holding.grant)

    def check_integrity(self) -> None:
        """Raises AssertionError if pages or rows are shared or lost, or a row is wrong."""
        self._space.check_integrity(holding.grant for holding in self._holdings.values())
        self._slots.check_integrity((slot, slot + 1) for slot in self._holdings)
        self._rows.check_integrity(holding.rows for holding in self._holdings.values())
        self._heads.check_integrity()
        held = sum(h.offsets.size for h in self._holdings.values())
        assert held == len({int(o) for h in self._holdings.values() for o in h.offsets})
        assert self.used_bytes <= self.budget_bytes, "over the budget"
        directory = self._tables.directory.cpu()
        for slot in range(self._slots.capacity):
            row, holding = directory[slot], self._holdings.get(slot)
            if holding is None:
                assert not row.any(), "a free slot is visible"
            elif row.any():
                assert np.array_equal(row.numpy(), holding.ranges), "a slot's row is wrong"

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _grow(self) -> None:
        """Replace the tables that are smaller than their allocators' capacity."""
        tables, slots, rows = self._tables, self._slots.capacity, self._rows.capacity
        if tables.directory.shape[0] < slots:
            tables = replace(tables, directory=enlarged(tables.directory, slots))
        if tables.pages.shape[0] < rows:
            tables = replace(
                tables,
                pages=enlarged(tables.pages, rows),
                page_scale=enlarged(tables.page_scale, rows),
                page_shift=enlarged(tables.page_shift, rows),
                page_kind=enlarged(tables.page_kind, rows),
            )
        self._tables = tables

    def _widen(self, ranges: npt.NDArray[np.int32]) -> None:
        """Let the kernels' grids cover a slot's pages in each group.

        They stay wide once it is gone: that costs programs without work, narrowing new graphs.
        """
        counts = (ranges[:, 1] - ranges[:, 0]).tolist()
        shapes = list(self._tables.shapes)
        for group, (count, shape) in enumerate(zip(counts, shapes, strict=True)):
            if count > shape.most_pages:
                shapes[group] = replace(shape, most_pages=rounded_to_power(count))
        if tuple(shapes) != self._tables.shapes:
            self._tables = replace(self._tables, shapes=tuple(shapes))

    def _ranges(self, image: AdapterImage, begin: int) -> npt.NDArray[np.int32]:
        """The slot's directory row: int32 [groups, 2], (0, 0) where there is no update."""
        groups = np.arange(len(self._groups))
        first = np.searchsorted(image.group, groups, side="left")
        last = np.searchsorted(image.group, groups, side="right")
        ranges = np.stack([first, last], axis=1) + begin
        ranges[first == last] = 0
        return ranges.astype(np.int32)

    def _describe_pages(self, image: AdapterImage, holding: _Holding) -> None:
        begin, end = holding.rows
        offsets = holding.offsets[: image.pages]
        pages = np.stack([offsets, offsets + image.b_offset, image.column, image.width], axis=1)
        self._tables.pages[begin:end].copy_(torch.from_numpy(pages))
        self._tables.page_scale[begin:end].copy_(torch.from_numpy(image.scale))
        self._tables.page_shift[begin:end].copy_(torch.from_numpy(image.shift))
        self._tables.page_kind[begin:end].copy_(torch.from_numpy(image.kind))

    def _copy_pages(
        self, image: AdapterImage, offsets: npt.NDArray[np.int64], pause: Pause
    ) -> None:
        arena = self._tables.arena
        for target, source, length in _runs(offsets, image):
            # On a CPU in pieces too small for a parallel region: the engine needs its threads.
            step = length if self.device.type == "cuda" else PIECE
            for begin in range(0, length, step):
                count = min(step, length - begin)
                piece = image.data[source + begin : source + begin + count]
                at = target + begin
                arena[at : at + count].copy_(piece, non_blocking=True)
                pause()


def too_large(needed: int, budget: int) -> str:
    """End of an error text: adapters of `needed` bytes can never be on the device together."""
    return (
        f"needs {needed} bytes of device memory, more than a budget of {budget} bytes has room for "
        f"(setting {SETTING}): raise it, or use adapters of lower rank, on fewer modules or with "
        "fewer heads"
    )


def _usual_shape(group: ModuleGroup) -> GroupShape:
    """Shape of a group for adapters of usual rank.

    Few adapters have pages behind sub-layers, for experts or routers: 0 pages there, so that the
    group is not called.
    """
    pages = -(-_USUAL_RANK // RANKS_PER_PAGE) * len(group.members)
    usual = group.source == "input" and group.kind not in ("expert", "router")
    return GroupShape(rounded_to_power(pages) if usual else 0, _aligned(group))


def _aligned(group: ModuleGroup) -> bool:
    """GroupShape.aligned. Pages begin at multiples of 64 bytes, so B begins at one of 16."""
    sizes = [size for member in group.members for size in (member.column, member.width)]
    if group.kind != "embedding":  # its A is looked up
        sizes.append(group.in_features)
    return all(size % 8 == 0 for size in sizes)


def _in_image_order(image: AdapterImage, grant: Grant) -> npt.NDArray[np.int64]:
    """Arena offset [P] of each page of the image."""
    offsets = np.empty(image.elements.size, dtype=np.int64)
    for size, places in grant.pages.items():
        offsets[image.elements == size] = places
    return offsets


def _runs(offsets: npt.NDArray[np.int64], image: AdapterImage) -> list[tuple[int, int, int]]:
    """Copies (arena offset, image offset, length): pages adjacent in both are one copy."""
    runs: list[tuple[int, int, int]] = []
    order = np.argsort(image.start)
    for target, source, length in zip(
        offsets[order].tolist(),
        image.start[order].tolist(),
        image.elements[order].tolist(),
        strict=True,
    ):
        if runs and runs[-1][0] + runs[-1][2] == target and runs[-1][1] + runs[-1][2] == source:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + length)
        else:
            runs.append((target, source, length))
    return runs
