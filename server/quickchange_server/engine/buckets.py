"""Which fixed shape a decode step is padded to, so that one captured graph serves many steps.

A shape of n rows has room for n sequences, so it serves n sequences that decode one row each, and
fewer that verify drafts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from quickchange_kernels.lowrank_tables import SMALL_TILE
from quickchange_server.adapters.batch import Room
from quickchange_server.engine.inputs import Extent, only_decodes
from quickchange_server.engine.scheduler import Scheduled

# (up to this many rows, in steps of): a step is padded by an eighth at most, few graphs are needed
_STEPS = ((64, 8), (128, 16), (1 << 30, 32))


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows, ascending: 1, 2, 4, 8, 16, 24, 32, ... and `most` as the last."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        following = 8 if sizes[-1] == 4 else sizes[-1] + _step(sizes[-1])
        sizes.append(following)
    return (*(size for size in sizes if size < most), most)


def _step(size: int) -> int:
    return next(step for limit, step in _STEPS if size < limit)


class DecodeBuckets:
    """The shapes of decode steps of up to `most` rows, of sequences of up to `blocks` blocks."""

    def __init__(self, most: int, blocks: int) -> None:
        self._sizes = bucket_sizes(most)
        self._blocks = blocks

    def extents(self, *, adapters: bool) -> list[Extent]:
        """All shapes, the largest first."""
        return [self._extent(size, adapters=adapters) for size in reversed(self._sizes)]

    def fit(self, plan: Sequence[Scheduled], *, adapters: bool) -> Extent | None:
        """The smallest shape that has room for the plan; None for one that no graph serves."""
        if not only_decodes(plan):
            return None
        rows = sum([item.rows for item in plan])
        segments, pieces = _needed(plan) if adapters else (0, 0)
        for size in self._sizes:
            extent = self._extent(size, adapters=adapters)
            room = extent.tokens_room
            if size >= rows and (
                room is None or (room.segments >= segments and room.pieces >= pieces)
            ):
                return extent
        return None

    def _extent(self, size: int, *, adapters: bool) -> Extent:
        # One adapter a row, and as much again for compositions whose rows are cut in several tiles.
        # Small tiles whatever the batch: most have a row or two under one adapter.
        room = Room(size, pieces=2 * size, tiles=size, height=SMALL_TILE) if adapters else None
        return Extent(size, size, size, self._blocks, room, room)


def _needed(plan: Sequence[Scheduled]) -> tuple[int, int]:
    """Segments and pieces of a plan."""
    segments = pieces = 0
    for components, group in groupby(plan, key=lambda item: item.components):
        rows = sum([item.rows for item in group])
        segments += len(components)
        pieces += len(components) * -(-rows // SMALL_TILE)
    return segments, pieces
