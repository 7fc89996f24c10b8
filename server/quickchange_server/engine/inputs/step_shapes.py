"""Shapes of steps: the exact one of a plan, and the few fixed ones that captured graphs have.

A decode shape of n rows has room for n sequences: n that decode one row each, or fewer that verify
drafts too. A mixed shape has room for chunks of prompts beside them, so that a step with a short
chunk need not be launched kernel by kernel: the host takes longer for that than the device does for
a thousand rows. Larger chunks are worth their launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch

from quickchange_kernels.lowrank.lowrank_tables import LARGE_TILE, SMALL_TILE
from quickchange_server.adapters.batch_segments import Components, Room, Run, room_for
from quickchange_server.engine.scheduling.scheduler import Scheduled

# (below this many rows, bucket step): a step is padded by an eighth at most, with few graphs
_STEPS = ((64, 8), (128, 16), (1 << 30, 32))
_EXACT = 32
_SEGMENTS_A_ROW = 4  # room for compositions where empty segments cost next to nothing
_MIXED = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Extent:
    """Capacity of a step's tensors."""

    rows: int
    sequences: int
    samples: int  # rows whose hidden states are returned; the LM head reads all but the pooled
    blocks: int  # per sequence
    tokens_room: Room | None  # segments over all rows; None: no row has an adapter
    samples_room: Room | None  # segments over the rows that are asked for
    head_room: Room | None  # segments over those of them that the LM head reads

    def __hash__(self) -> int:
        return hash((self.rows, self.samples, self.tokens_room is None))  # looked up in every step

    @property
    def all_sampled(self) -> bool:
        """True if every row may be sampled, so that segments over them are the same."""
        return self.rows == self.samples and self.tokens_room == self.samples_room


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What the shape of a step follows from, of each of its sequences."""

    rows: list[int]
    sampled: list[int]  # rows that are sampled, the last ones
    # Of each run of a sequence's rows under one composition: most sequences have one run.
    components: list[Components]
    run_rows: list[int]
    run_sampled: list[int]
    samples: int  # sampled rows in all
    all_sampled: bool  # the plan has last tokens and drafts only
    reads: bool  # some sequence may read its prompt's rows

    @property
    def adapters(self) -> bool:
        """True if some row has one."""
        return any(self.components)

    @classmethod
    def of(cls, plan: Sequence[Scheduled]) -> PlanShape:
        rows = [item.rows for item in plan]
        sampled = [item.sampled_rows for item in plan]
        components = [item.components for item in plan]
        runs = components, rows, sampled
        if any(item.stretches for item in plan):
            runs = _cut(plan)
        reads = any(item.sequence.reading is not None for item in plan)
        return cls(rows, sampled, *runs, sum(sampled), rows == sampled, reads)


def _cut(plan: Sequence[Scheduled]) -> tuple[list[Components], list[int], list[int]]:
    """Components, rows and sampled rows of all runs."""
    components: list[Components] = []
    rows: list[int] = []
    sampled: list[int] = []
    for item in plan:
        left = item.rows
        for run in _runs(item):
            components.append(run.components)
            rows.append(run.rows)
            sampled.append(max(0, min(run.rows, item.sampled_rows - left + run.rows)))
            left -= run.rows
    return components, rows, sampled


def _runs(item: Scheduled) -> list[Run]:
    return item.runs(item.first, item.first + item.rows)


def _sampled_runs(item: Scheduled) -> list[Run]:
    end = item.first + item.rows
    return item.runs(end - item.sampled_rows, end)


def _read_runs(item: Scheduled, read: range) -> list[Run]:
    return item.runs(read.start, read.stop) if read else []


def pools(plan: Iterable[Scheduled]) -> bool:
    """True if some rows that are asked for don't pass the LM head."""
    return any(item.sequence.reading is not None and bool(item.pooled) for item in plan)


def token_runs(plan: Iterable[Scheduled]) -> list[Run]:
    return [run for item in plan for run in _runs(item)]


def head_runs(plan: Iterable[Scheduled]) -> list[Run]:
    sampled = [run for item in plan if item.samples for run in _sampled_runs(item)]
    return sampled + [run for item in plan for run in _read_runs(item, item.scored)]


def sample_runs(plan: Iterable[Scheduled]) -> list[Run]:
    return head_runs(plan) + [run for item in plan for run in _read_runs(item, item.pooled)]


def exact_extent(plan: Sequence[Scheduled], shape: PlanShape, device: torch.device) -> Extent:
    """The smallest extent that holds a plan."""
    tokens_room = samples_room = head_room = None
    if shape.adapters:
        tokens_room = room_for(token_runs(plan), device)
        samples_room = tokens_room if shape.all_sampled else room_for(sample_runs(plan), device)
        head_room = room_for(head_runs(plan), device) if pools(plan) else samples_room
    read = [len(item.scored) + len(item.pooled) for item in plan] if shape.reads else ()
    return Extent(
        rows=sum(shape.rows),
        sequences=len(plan),
        samples=shape.samples + sum(read),
        blocks=max([len(item.sequence.blocks) for item in plan]),
        tokens_room=tokens_room,
        samples_room=samples_room,
        head_room=head_room,
    )


def exact_sizes(most: int) -> tuple[int, ...]:
    """Row counts, ascending, for a device that computes padding like any row: all up to 32, then
    36, 40, ... and `most` as the last."""
    fine = range(1, min(most, _EXACT))
    return (*fine, *range(max(_EXACT, 1), most, 4), most)


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Row counts, ascending: 1, 2, 4, 8, 16, 24, 32, ... and `most` as the last."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        following = 8 if sizes[-1] == 4 else sizes[-1] + _step(sizes[-1])
        sizes.append(following)
    return (*(size for size in sizes if size < most), most)


def _step(size: int) -> int:
    return next(step for limit, step in _STEPS if size < limit)


class StepBuckets:
    """Fixed shapes of steps: decode steps of up to `most` rows, sequences of up to `blocks` blocks;
    mixed ones of up to `most_mixed` rows, of `sequences` sequences at most; 0: there are none.

    exact: padding costs what rows cost, and kernels need no tiles, as on a CPU.
    """

    def __init__(
        self,
        most: int,
        blocks: int,
        sequences: int = 0,
        most_mixed: int = 0,
        *,
        exact: bool = False,
    ) -> None:
        self._blocks = blocks
        self._exact = exact
        self._most_samples = most
        self._sequences = sequences
        sizes = [size for size in _MIXED if size < most_mixed]
        if sizes or most_mixed:
            sizes.append(min(most_mixed, _MIXED[-1]))
        decode_sizes = exact_sizes(most) if exact else bucket_sizes(most)
        self._last: tuple[PlanShape | None, Extent | None] = None, None
        self._extents = {
            adapters: (
                [self._decode(size, adapters=adapters) for size in decode_sizes],
                [self._mixed(size, adapters=adapters) for size in sorted(set(sizes))],
            )
            for adapters in (False, True)
        }

    def extents(self, *, adapters: bool) -> list[Extent]:
        """All shapes, the largest first, those of decode steps before the mixed ones."""
        decode, mixed = self._extents[adapters]
        return [*reversed(decode), *reversed(mixed)]

    def fit(self, shape: PlanShape) -> Extent | None:
        """The smallest shape that holds the plan; None if no graph serves it."""
        if shape != self._last[0]:
            self._last = shape, self._fitting(shape)
        return self._last[1]

    def _fitting(self, shape: PlanShape) -> Extent | None:
        adapters = shape.adapters
        decode, mixed = self._extents[adapters]
        rows = sum(shape.rows)
        needed = _needed(shape.components, shape.run_rows) if adapters else _Need()
        if shape.all_sampled:
            for extent in decode:
                if extent.rows >= rows and needed.fits(extent.tokens_room):
                    return extent
        if shape.reads:
            return None
        sampled = _needed(shape.components, shape.run_sampled) if adapters else _Need()
        for extent in mixed:
            if (
                extent.rows >= rows
                and extent.sequences >= len(shape.rows)
                and extent.samples >= shape.samples
                and needed.fits(extent.tokens_room)
                and sampled.fits(extent.samples_room)
            ):
                return extent
        return None

    def holding(self, rows: int) -> Extent | None:
        """The shape of a decode step of so many rows without adapters."""
        decode, _ = self._extents[False]
        return next((extent for extent in decode if extent.rows >= rows), None)

    def _decode(self, size: int, *, adapters: bool) -> Extent:
        # Pieces: one adapter per row, doubled for compositions whose rows are cut in several tiles.
        # Small tiles whatever the batch: most have a row or two under one adapter.
        room = None
        if adapters and self._exact:
            room = Room(_SEGMENTS_A_ROW * size)
        elif adapters:
            room = Room(size, pieces=2 * size, tiles=size, height=SMALL_TILE)
        return Extent(size, size, size, self._blocks, room, room, room)

    def _mixed(self, size: int, *, adapters: bool) -> Extent:
        sequences, samples = min(size, self._sequences), min(size, self._most_samples)
        over_tokens = over_samples = None
        if adapters:
            # As many segments as the decode step of all sequences has; tiles as chunks need them.
            tiles = sequences + size // LARGE_TILE
            segments = max(sequences, min(size, self._most_samples))
            over_tokens = Room(segments, pieces=2 * tiles, tiles=tiles, height=LARGE_TILE)
            over_samples = Room(samples, pieces=2 * samples, tiles=samples, height=SMALL_TILE)
        return Extent(
            size, sequences, samples, self._blocks, over_tokens, over_samples, over_samples
        )


class _Need(NamedTuple):
    """Segments that a batch needs, and the rows of each stretch under one composition."""

    segments: int = 0
    stretches: tuple[tuple[int, int], ...] = ()  # (rows, components)

    def fits(self, room: Room | None) -> bool:
        if room is None:
            return True
        if room.height is None:
            return room.segments >= self.segments
        tiles = [-(-rows // room.height) for rows, _ in self.stretches]
        pieces = sum([n * number for n, (_, number) in zip(tiles, self.stretches, strict=True)])
        return room.segments >= self.segments and room.pieces >= pieces and room.tiles >= sum(tiles)


def _needed(components: Iterable[Components], rows: Iterable[int]) -> _Need:
    stretches = []
    for own, group in groupby(zip(components, rows, strict=True), key=itemgetter(0)):
        count = sum([number for _, number in group])
        if own and count:
            stretches.append((count, len(own)))
    return _Need(sum([number for _, number in stretches]), tuple(stretches))
