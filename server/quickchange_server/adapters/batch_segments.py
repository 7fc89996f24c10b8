"""Segments of a step: the rows that take each adapter slot, and its weight.

Neighbouring sequences under the same composition become one segment. Rows without an adapter are in
no segment and cost nothing; a composition is several segments over the same rows.

All of a step's segments travel in one int32 tensor, so that a device gets them in one copy: into
fresh memory (`segments`), or into memory that a captured graph reads (`pack` and `unpack`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch

from quickchange_kernels import dispatch
from quickchange_kernels.lowrank.lowrank_contract import RowTiles, Segments
from quickchange_kernels.lowrank.lowrank_tables import cut_tiles, tile_height

Components = tuple[tuple[int, float], ...]  # (device slot, weight) of each adapter
# (first position, components) of a text's stretches under one composition each, the first from 0.
Stretches = tuple[tuple[int, Components], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` neighbouring rows under one composition."""

    rows: int
    components: Components


@dataclass(frozen=True, slots=True)
class Room:
    """Capacity of a batch's segments; what a batch leaves unused is empty and does nothing."""

    segments: int
    pieces: int = 0
    tiles: int = 0
    height: int | None = None  # rows per tile; None: no tiles, for kernels that need none

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the packed fields, in int32: rows, slot, weight, pieces, tiles."""
        return (
            2 * self.segments,
            self.segments,
            self.segments,
            4 * self.pieces,
            4 * self.tiles,
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments on the host, with `rows` as flat (begin, end) pairs."""

    rows: list[int]
    slots: list[int]
    weights: list[float]
    pieces: list[tuple[int, int, int, int]]
    tiles: list[tuple[int, int, int, int]]

    def room(self, height: int | None) -> Room:
        """The smallest room for the batch. height: rows per tile; None: no tiles."""
        return Room(len(self.slots), len(self.pieces), len(self.tiles), height)


def runs_between(stretches: Stretches, begin: int, end: int) -> list[Run]:
    """Runs of the rows at positions [begin, end) of a text, with at least one row each."""
    ends = [*[first for first, _ in stretches[1:]], end]
    found = []
    for (first, components), last in zip(stretches, ends, strict=True):
        rows = min(last, end) - max(first, begin)
        if rows > 0:
            found.append(Run(rows, components))
    return found


def segments(runs: Sequence[Run], device: torch.device, room: Room | None = None) -> Segments:
    """Segments over the rows of `runs`, laid one after the other from row 0.

    room: None: the smallest. Raises ValueError for runs that don't fit in it.
    """
    room = room_for(runs, device) if room is None else room
    return unpack(pack(runs, room).to(device), room)


def room_for(runs: Sequence[Run], device: torch.device) -> Room:
    """The smallest room for the runs, with tiles if the device's kernels need them."""
    spans = list(_spans(runs))
    height = _height(spans) if dispatch.triton_serves(device) else None
    return _batch(spans, height).room(height)


def pack(runs: Sequence[Run], room: Room) -> torch.Tensor:
    """Segments over `runs` as one host tensor: int32 [sum(room.sizes)].

    Raises ValueError for runs that don't fit in `room`.
    """
    return _packed(_batch(list(_spans(runs)), room.height), room)


def unpack(packed: torch.Tensor, room: Room) -> Segments:
    """Segments as views of `packed`, which `pack` made, on any device."""
    rows, slot, weight, pieces, tiles = torch.split(packed, list(room.sizes))
    return Segments(
        rows=rows.view(-1, 2),
        slot=slot,
        weight=weight.view(torch.float32),
        tiles=None
        if room.height is None
        else RowTiles(pieces.view(-1, 4), tiles.view(-1, 4), room.height),
    )


def _spans(runs: Sequence[Run]) -> Iterator[tuple[int, int, Components]]:
    """(begin, end, components) of each stretch of rows under one composition."""
    begin = 0
    for components, group in groupby(runs, key=lambda run: run.components):
        end = begin + sum([run.rows for run in group])
        if components and end > begin:
            yield begin, end, components
        begin = end


def _height(spans: Sequence[tuple[int, int, Components]]) -> int:
    return tile_height(max((end - begin for begin, end, _ in spans), default=0))


def _batch(spans: Sequence[tuple[int, int, Components]], height: int | None) -> _Batch:
    rows: list[int] = []
    slots: list[int] = []
    weights: list[float] = []
    covered: list[tuple[int, int, range]] = []
    for begin, end, components in spans:
        covered.append((begin, end, range(len(slots), len(slots) + len(components))))
        for slot, weight in components:
            rows += (begin, end)
            slots.append(slot)
            weights.append(weight)
    pieces, tiles = ([], []) if height is None else cut_tiles(covered, slots, height)
    return _Batch(rows, slots, weights, pieces, tiles)


def _packed(batch: _Batch, room: Room) -> torch.Tensor:
    needed = batch.room(room.height)
    for size, limit in zip(needed.sizes, room.sizes, strict=True):
        if size > limit:
            raise ValueError(f"the batch needs {needed}, more than {room}: take a larger one")
    fields: tuple[array[int] | array[float], ...] = (
        array("i", batch.rows),
        array("i", batch.slots),
        array("f", batch.weights),
        array("i", chain.from_iterable(batch.pieces)),
        array("i", chain.from_iterable(batch.tiles)),
    )
    # torch reads no empty buffer, and needs one that may be written
    packed = bytearray(4 * sum(room.sizes) or 4)
    begin = 0
    for field, size in zip(fields, room.sizes, strict=True):
        packed[begin : begin + 4 * len(field)] = field.tobytes()
        begin += 4 * size
    return torch.frombuffer(packed, dtype=torch.int32)[: sum(room.sizes)]
