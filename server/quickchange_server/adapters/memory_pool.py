"""Device memory of the adapters, counted in ranks: one arena of pages and the tables over it.

A page is 8 ranks of one module's update (packing.py), so rank 8 pays for 8 and rank 64 for 64 (a
gain for its own row alone), and a byte budget, not a number of slots, bounds how many adapters are
resident. A slot is an adapter's row in the tables' directory. An adapter's Turbo heads lie in pages
of the same arena, come and go with its slot, and have tables of their own (turbo_tables.py).

The tables never grow, since captured graphs hold their addresses: a directory and a page table that
the arena can't outgrow are made at the start. Grids are of a fixed size too, for adapters up to the
rank that is usual here (`most_rank`). A slot with more pages in some group is "wide": steps with
one use `wide_tables`, the same memory with wider grids, which no graph is captured for.

Everything but `write` runs on the engine's thread, between steps, on the steps' own stream. Changes
are made in place: in rows that no step reads, those of slots that no batch refers to, or, where the
page table is closed up, behind the steps that read them before. `write` fills arena pages only.
Knows nothing of names, requests or eviction.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import (
    RANKS_PER_PAGE,
    GroupShape,
    LowRankTables,
)
from quickchange_kernels.lowrank.lowrank_tables import rounded_to_power
from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadTables
from quickchange_server.adapters.adapter_loader import Copies, Mark, copies_for
from quickchange_server.adapters.arena_sizes import SETTING, ArenaSizes
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.adapters.paced_copies import PIECE, Pause, no_pause
from quickchange_server.adapters.packing import AdapterImage
from quickchange_server.adapters.slab_allocator import Grant, RunAllocator, SlabAllocator
from quickchange_server.adapters.turbo_tables import HeadPool, TurboSlot
from quickchange_server.errors import AdapterFailedError

USUAL_RANK = 64  # of a GPU's grids, unless set

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Holding:
    """Pages and table rows of one slot."""

    grant: Grant  # its pages in the arena, in elements
    offsets: npt.NDArray[np.int64]  # [P] the same pages, in the image's order
    rows: tuple[int, int]  # [begin, end) in the page table
    ranges: npt.NDArray[np.int32]  # [groups, 2] its directory row, once published
    tokens: int  # of its vocabulary; 0: the base's own
    after: Mark  # steps given to the device later read none of the pages' old content
    visible: bool = False  # published


class DevicePool:
    """The arena of adapter pages and its tables."""

    def __init__(
        self,
        groups: Sequence[ModuleGroup],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        copies: Copies | None = None,
        most_rank: int = USUAL_RANK,
    ) -> None:
        """Take `budget_bytes` of device memory at once, and some more for the tables.

        copies: runs the copies to the device; None: those that suit it. most_rank: of adapters in
        steps that run from captured graphs.
        Raises ValueError, naming the setting, if the largest page does not fit.
        """
        sizes = ArenaSizes.of(groups, budget_bytes, dtype)
        self.budget_bytes = budget_bytes
        self.sizes = sizes
        self.dtype = dtype
        self.device = device
        self._groups = tuple(groups)
        self._copies = copies_for(device) if copies is None else copies
        self._space = SlabAllocator(sizes.span, sizes.slab)
        self._slots, self._rows = RunAllocator(sizes.slots), RunAllocator(sizes.rows)
        self._holdings: dict[int, _Holding] = {}
        self._tokens = self._zeros(torch.int32, sizes.slots)
        self._tables = LowRankTables(
            # Not zeroed, so that on a CPU only pages in use take memory: `write` fills all of one.
            arena=torch.empty(sizes.span, dtype=dtype, device=device),
            directory=self._zeros(torch.int32, sizes.slots, len(groups), 2),
            pages=self._zeros(torch.int64, sizes.rows, 4),
            page_scale=self._zeros(torch.float32, sizes.rows),
            page_shift=self._zeros(torch.float32, sizes.rows, RANKS_PER_PAGE),
            page_kind=self._zeros(torch.int32, sizes.rows),
            shapes=tuple(_usual_shape(group, most_rank) for group in groups),
            tokens=self._tokens,
        )
        self._wide_tables = self._tables
        self._wide: set[int] = set()  # slots
        self._heads = HeadPool(self._tables.arena, sizes.rows)

    @property
    def tables(self) -> LowRankTables:
        """Tables for steps without wide slots: one object for good. A slot's row is empty until
        `publish`."""
        return self._tables

    @property
    def wide_tables(self) -> LowRankTables:
        """Tables for steps with any slots."""
        return self._wide_tables

    def tables_of(self, slots: Collection[int]) -> LowRankTables:
        """Tables for a step with these slots."""
        return self._tables if self._wide.isdisjoint(slots) else self._wide_tables

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

    def fits(self, demands: Collection[Mapping[int, int]], kept_slots: Iterable[int]) -> bool:
        """True if adapters of these demands (pages by size) have room beside the kept slots."""
        kept = [self._holdings[slot] for slot in kept_slots]
        total = Counter[int]()
        for demand in demands:
            total.update(demand)
        return self._tables_fit(demands, kept) and self._space.fits(
            total, [holding.grant for holding in kept]
        )

    def allocate(self, image: AdapterImage) -> int | None:
        """Take a slot for the image, not visible yet; None if there is no room now.

        Raises AdapterFailedError, with both figures, for an image larger than the whole budget.
        """
        demand = image.demand
        if not self.fits([demand], ()):
            raise AdapterFailedError(too_large(image.nbytes, self.budget_bytes))
        if not self._tables_fit([demand], list(self._holdings.values())):
            return None
        grant = self._space.allocate(demand)
        if grant is None:
            return None
        slot, begin = self._slots.allocate(1), self._rows.allocate(image.pages)
        if begin is None:
            self._close_up()
            begin = self._rows.allocate(image.pages)
        assert slot is not None, "a slot is lost"
        assert begin is not None, "a row is lost"
        rows, ranges = (begin, begin + image.pages), self._ranges(image, begin)
        offsets = _in_image_order(image, grant)
        holding = _Holding(grant, offsets, rows, ranges, image.tokens, self._copies.mark())
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
        holding = self._holdings[slot] = replace(self._holdings[slot], visible=True)
        self._tables.directory[slot].copy_(torch.from_numpy(holding.ranges))
        self._tokens[slot] = holding.tokens
        self._note_width(slot, holding.ranges)
        self._heads.publish(slot)

    def free(self, slot: int) -> None:
        """Give the slot and its pages back. No later step may refer to it."""
        holding = self._holdings.pop(slot)
        self._wide.discard(slot)
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
        visible = set(directory.flatten(1).any(1).nonzero().flatten().tolist())
        assert visible <= set(self._holdings), "a free slot is visible"
        for slot in visible:
            row, holding = directory[slot], self._holdings[slot]
            assert np.array_equal(row.numpy(), holding.ranges), "a slot's row is wrong"

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _tables_fit(
        self, demands: Collection[Mapping[int, int]], kept: Collection[_Holding]
    ) -> bool:
        """True if the tables have rows for adapters of these demands beside what is kept."""
        rows = sum(holding.offsets.size for holding in kept)
        rows += sum(sum(demand.values()) for demand in demands)
        slots = len(demands) + len(kept)
        return slots <= self._slots.capacity and rows <= self._rows.capacity

    def _close_up(self) -> None:
        """Move all rows of the page table together, so that the free ones are one run."""
        order = sorted(self._holdings, key=lambda slot: self._holdings[slot].rows)
        runs = self._rows.close_up([self._holdings[slot].rows for slot in order])
        before = np.concatenate([np.arange(*self._holdings[slot].rows) for slot in order])
        source = torch.from_numpy(before).to(self.device)
        tables = self._tables
        for table in (tables.pages, tables.page_scale, tables.page_shift, tables.page_kind):
            table[: len(before)] = table.index_select(0, source)
        for slot, rows in zip(order, runs, strict=True):
            holding = self._holdings[slot]
            moved = np.where(holding.ranges[:, :1] < holding.ranges[:, 1:], holding.ranges, 0)
            moved[moved[:, 1] > 0] -= holding.rows[0] - rows[0]
            self._holdings[slot] = replace(holding, rows=rows, ranges=moved)
            if holding.visible:
                self._tables.directory[slot].copy_(torch.from_numpy(moved))

    def _note_width(self, slot: int, ranges: npt.NDArray[np.int32]) -> None:
        """Let `wide_tables` cover a slot's pages in each group, if the usual ones do not.

        They stay wide once it is gone: that costs programs without work.
        """
        counts = (ranges[:, 1] - ranges[:, 0]).tolist()
        if all(
            count <= shape.most_pages
            for count, shape in zip(counts, self._tables.shapes, strict=True)
        ):
            return
        self._wide.add(slot)
        if self.device.type == "cuda":
            logger.warning(
                "an adapter of a higher rank than max_adapter_rank, or with updates behind "
                "sub-layers, of experts or of routers: steps with it run without captured graphs"
            )
        shapes = tuple(
            replace(
                shape, most_pages=max(shape.most_pages, rounded_to_power(count) if count else 0)
            )
            for count, shape in zip(counts, self._wide_tables.shapes, strict=True)
        )
        if shapes != self._wide_tables.shapes:
            self._wide_tables = replace(self._tables, shapes=shapes)

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


def _usual_shape(group: ModuleGroup, most_rank: int) -> GroupShape:
    """Shape of a group for adapters up to a rank, with a bias or a gain.

    Few adapters have pages behind sub-layers, for experts, routers or norms: 0 pages there, so that
    the group is not called.
    """
    pages = (-(-most_rank // RANKS_PER_PAGE) + 1) * len(group.members)
    usual = group.source == "input" and group.kind not in ("expert", "router", "norm")
    return GroupShape(pages if usual else 0, _aligned(group))


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
