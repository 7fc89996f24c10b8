"""Host tensors of a step: the plan as the model reads it, in exact size or padded to a fixed shape.

Padding is harmless by the operations' contracts: rows of slot -1 are not written to the cache,
sequences of length 0 have no queries, segments without rows do nothing. Decode steps are padded to
a few shapes, so that one captured graph serves many steps. A shape of n rows has room for n
sequences: n that decode one row each, or fewer that verify drafts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.lowrank.lowrank_tables import SMALL_TILE
from quickchange_server.adapters.batch_segments import Room, Run, pack, room_for, unpack
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.forward_context import (
    SPARE_STATE,
    ZERO_STATE,
    AdapterBatch,
    AttentionBatch,
    ForwardContext,
    StatePart,
)

_NOWHERE = -1  # the slot of a row that is written to no block


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


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Segments packed in one tensor, with their room."""

    packed: Tensor  # int32, as made by `batch_segments.pack`
    room: Room


@dataclass(frozen=True, slots=True)
class PartInputs:
    """A `StatePart` before its segments are unpacked; those of all rows are the step's own."""

    rows: Tensor | None
    length: int
    read: Tensor | None
    write: Tensor
    tokens: PackedSegments | None

    def part(self, tables: LowRankTables | None, whole: AdapterBatch | None) -> StatePart:
        """whole: the step's adapters."""
        adapters = whole if self.rows is None else None
        if tables is not None and self.tokens is not None:
            own = unpack(self.tokens.packed, self.tokens.room)
            adapters = AdapterBatch(tables, own, own, own)
        return StatePart(self.rows, self.length, self.read, self.write, adapters)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs of a step's forward pass, besides weights, caches and the adapters' tables."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    sample_rows: Tensor  # int64 [R]: sampled rows, then scored, then pooled
    head_rows: int | None  # the LM head reads the first so many of them; None: all
    attention: AttentionBatch
    tokens: PackedSegments | None
    samples: PackedSegments | None
    head: PackedSegments | None
    states: tuple[PartInputs, ...] = ()  # for models with recurrent layers alone
    # int64 [T]: which of the latest step's sampled tokens is the row's, -1: that in `ids`.
    feed: Tensor | None = None
    reach: Tensor | None = None  # int64 [T], if the model scales positions by the text

    def step(self, tables: LowRankTables | None) -> ForwardContext:
        """The forward context that the model's seams read; all tensors on the model's device."""
        adapters = self._adapters(tables)
        states = tuple([part.part(tables, adapters) for part in self.states])
        return ForwardContext(self.attention, adapters, states, self.reach)

    def _adapters(self, tables: LowRankTables | None) -> AdapterBatch | None:
        if tables is None or self.tokens is None or self.samples is None or self.head is None:
            return None
        tokens = unpack(self.tokens.packed, self.tokens.room)
        samples = head = tokens
        if self.samples is not self.tokens:
            samples = head = unpack(self.samples.packed, self.samples.room)
        if self.head is not self.samples:
            head = unpack(self.head.packed, self.head.room)
        return AdapterBatch(tables, tokens, samples, head)


def only_decodes(plan: Sequence[Scheduled]) -> bool:
    """True if the plan has last tokens and drafts only, so that every row is sampled."""
    return all(item.count == 1 and item.samples for item in plan)


def reads(plan: Sequence[Scheduled]) -> bool:
    """True if some sequence may read its prompt's rows."""
    return bool([item for item in plan if item.sequence.reading is not None])


def exact_extent(plan: Sequence[Scheduled], device: torch.device, *, adapters: bool) -> Extent:
    """The smallest extent that holds a plan. adapters: True if some row has one."""
    tokens_room = samples_room = head_room = None
    if adapters:
        tokens_room = room_for(_token_runs(plan), device)
        same = only_decodes(plan)
        samples_room = tokens_room if same else room_for(_sample_runs(plan), device)
        head_room = room_for(_head_runs(plan), device) if _pools(plan) else samples_room
    return Extent(
        rows=sum([item.rows for item in plan]),
        sequences=len(plan),
        samples=sum(
            [item.sampled_rows + len(item.scored) + len(item.pooled) for item in plan]
            if reads(plan)
            else [item.sampled_rows for item in plan]
        ),
        blocks=max(len(item.sequence.blocks) for item in plan),
        tokens_room=tokens_room,
        samples_room=samples_room,
        head_room=head_room,
    )


def step_inputs(
    plan: Sequence[Scheduled],
    extent: Extent,
    block_size: int,
    states_on: torch.device | None = None,
) -> StepInputs:
    """The plan's tensors on the host, padded to `extent`.

    states_on: the device of a model with recurrent layers; None: it has none. Raises ValueError if
    the plan is larger.
    """
    ids: list[int] = []
    places: list[int] = []
    for item in plan:
        sequence, first = item.sequence, item.first
        known = sequence.tokens[first : first + item.count]
        ids += known
        ids += (0,) * (item.count - len(known))  # not on the host yet: see `row_feed`
        ids += item.drafts
        places += range(first, first + item.rows)
    ends = list(accumulate([item.rows for item in plan]))
    sampled: list[int] = []
    for item, end in zip(plan, ends, strict=True):
        sampled += range(end - item.sampled_rows, end)
    head_rows = None
    if reads(plan):
        sampled += _rows_at(plan, ends, [item.scored for item in plan])
        head_rows = len(sampled)
        sampled += _rows_at(plan, ends, [item.pooled for item in plan])
    lengths = [item.sequence.computed + item.rows for item in plan]
    positions = _padded(places, extent.rows, np.int64)
    tables = np.zeros((extent.sequences, extent.blocks), dtype=np.int32)
    for row, item in enumerate(plan):
        blocks = item.sequence.blocks
        tables[row, : len(blocks)] = blocks
    slots = np.full(extent.rows, _NOWHERE, dtype=np.int64)
    slots[: len(places)] = _slots(plan, positions[: len(places)], tables, block_size)
    tokens, samples, head = _segments(plan, extent)
    return StepInputs(
        ids=torch.from_numpy(_padded(ids, extent.rows, np.int64)),
        positions=torch.from_numpy(positions),
        sample_rows=torch.from_numpy(_padded(sampled, extent.samples, np.int64)),
        head_rows=None if head_rows == len(sampled) else head_rows,
        attention=AttentionBatch(
            slots=torch.from_numpy(slots),
            block_tables=torch.from_numpy(tables),
            seq_lens=torch.from_numpy(_padded(lengths, extent.sequences, np.int32)),
            query_start=torch.from_numpy(
                _padded([0, *ends], extent.sequences + 1, np.int32, fill=len(places))
            ),
        ),
        tokens=tokens,
        samples=samples,
        head=head,
        states=() if states_on is None else _state_parts(plan, extent, states_on),
    )


def row_feed(plan: Sequence[Scheduled], rows: int) -> Tensor:
    """Places of the rows' tokens among the latest step's sampled ones, int64 [rows]; -1 for rows
    whose tokens the host knows."""
    feed: list[int] = []
    for item in plan:
        pending = item.sequence.pending
        feed += (_NOWHERE,) * (item.rows - pending)
        feed += (item.sequence.token_row,) * pending
    return torch.from_numpy(_padded(feed, rows, np.int64, fill=_NOWHERE))


def row_reach(plan: Sequence[Scheduled], rows: int) -> Tensor:
    """Reach of each row, int64 [rows]: its sequence's, or its position + 1 if that is more."""
    reach: list[int] = []
    for item in plan:
        first = item.sequence.computed + 1
        reach += [max(item.sequence.reach, end) for end in range(first, first + item.rows)]
    return torch.from_numpy(_padded(reach, rows, np.int64))


def one_row_each(plan: Sequence[Scheduled]) -> bool:
    """True if recurrent layers compute all of the plan in one call, in a shape that is fixed."""
    return all(item.rows == 1 for item in plan)


def _state_parts(
    plan: Sequence[Scheduled], extent: Extent, device: torch.device
) -> tuple[PartInputs, ...]:
    """Rows that recurrent layers compute together, in order: one row of each sequence, if no one
    has more; else each chunk alone, then all lone rows, then all first drafts, and so on."""
    starts = list(accumulate([item.rows for item in plan], initial=0))[:-1]
    if one_row_each(plan):
        lone = [_lone_row(item, start) for item, start in zip(plan, starts, strict=True)]
        return (_part(lone, None, extent.rows),)
    groups: list[list[_Rows]] = []
    depths: list[list[_Rows]] = [[] for _ in range(1 + max(len(item.drafts) for item in plan))]
    for item, start in zip(plan, starts, strict=True):
        if item.count > 1:
            groups += [[rows] for rows in _chunk(item, start)]
        else:
            depths[0].append(_lone_row(item, start))
        states = _states_before_drafts(item)
        for depth in range(1, 1 + len(item.drafts)):
            row = start + item.count + depth - 1
            depths[depth].append(_Rows(item, row, 1, states[depth - 1], states[depth]))
    groups += [rows for rows in depths if rows]
    return tuple([_part(group, None if len(groups) == 1 else device) for group in groups])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one sequence in a part; state rows of what is before them and what is after."""

    item: Scheduled
    first: int
    count: int
    read: int
    write: int


def _lone_row(item: Scheduled, row: int) -> _Rows:
    return _Rows(item, row, 1, item.sequence.state, item.sequence.states[0])


def _chunk(item: Scheduled, start: int) -> Iterator[_Rows]:
    """Scheduled rows of a sequence, up to a state that is to be kept and behind it."""
    sequence = item.sequence
    read, left = sequence.state, item.count
    if sequence.border is not None:
        before = sequence.border.tokens - sequence.computed
        yield _Rows(item, start, before, read, sequence.border.row)
        start, left, read = start + before, left - before, sequence.border.row
    if left:
        yield _Rows(item, start, left, read, sequence.states[0])


def _states_before_drafts(item: Scheduled) -> list[int]:
    """State rows after the last scheduled row and after each draft."""
    sequence = item.sequence
    border = sequence.border
    if border is not None and border.tokens == sequence.computed + item.count:
        return [border.row, *sequence.states[1:]]
    return sequence.states


def _part(group: Sequence[_Rows], device: torch.device | None, padded_to: int = 0) -> PartInputs:
    """One call's inputs. device: None if the call has all the step's rows in their order."""
    length = group[0].count if group else 1
    size = max(padded_to, len(group))
    read = torch.from_numpy(_padded([rows.read for rows in group], size, np.int64, ZERO_STATE))
    write = torch.from_numpy(_padded([rows.write for rows in group], size, np.int64, SPARE_STATE))
    # In their form for several rows, layers begin without a state as transformers has them begin.
    begins = length > 1 and group[0].read == ZERO_STATE
    inputs = PartInputs(None, length, None if begins else read, write, None)
    if device is None:
        return inputs
    places = np.concatenate([np.arange(rows.first, rows.first + rows.count) for rows in group])
    runs = [Run(rows.count, rows.item.components) for rows in group]
    tokens = None
    if any(run.components for run in runs):
        room = room_for(runs, device)
        tokens = PackedSegments(pack(runs, room), room)
    return replace(inputs, rows=torch.from_numpy(places), tokens=tokens)


def _rows_at(
    plan: Sequence[Scheduled], ends: Sequence[int], positions: Sequence[range]
) -> list[int]:
    """Rows of the step at the given positions of each sequence."""
    rows: list[int] = []
    for item, end, wanted in zip(plan, ends, positions, strict=True):
        shift = end - item.rows - item.sequence.computed
        rows += range(wanted.start + shift, wanted.stop + shift) if wanted else ()
    return rows


def _slots(
    plan: Sequence[Scheduled],
    positions: npt.NDArray[np.integer],
    tables: npt.NDArray[np.int32],
    block_size: int,
) -> npt.NDArray[np.int64]:
    """KV slot of each row [T]: block · block size + offset."""
    sequence = np.repeat(np.arange(len(plan)), [item.rows for item in plan])
    block, offset = np.divmod(positions, block_size)
    slots: npt.NDArray[np.int64] = tables[sequence, block].astype(np.int64) * block_size + offset
    return slots


def _segments(
    plan: Sequence[Scheduled], extent: Extent
) -> tuple[PackedSegments | None, PackedSegments | None, PackedSegments | None]:
    """Segments over all rows, those asked for and the LM head's: one object for the same rows."""
    if extent.tokens_room is None or extent.samples_room is None or extent.head_room is None:
        return None, None, None
    tokens = PackedSegments(pack(_token_runs(plan), extent.tokens_room), extent.tokens_room)
    if extent.tokens_room == extent.samples_room and only_decodes(plan):
        return tokens, tokens, tokens
    samples = PackedSegments(pack(_sample_runs(plan), extent.samples_room), extent.samples_room)
    if not _pools(plan):
        return tokens, samples, samples
    head = PackedSegments(pack(_head_runs(plan), extent.head_room), extent.head_room)
    return tokens, samples, head


def _token_runs(plan: Sequence[Scheduled]) -> list[Run]:
    return [Run(item.rows, item.components) for item in plan]


def _pools(plan: Sequence[Scheduled]) -> bool:
    """True if some rows that are asked for don't pass the LM head."""
    return reads(plan) and bool([item for item in plan if item.pooled])


def _sample_runs(plan: Sequence[Scheduled]) -> list[Run]:
    pooled = [Run(len(item.pooled), item.components) for item in plan if item.pooled]
    return _head_runs(plan) + pooled if reads(plan) else _head_runs(plan)


def _head_runs(plan: Sequence[Scheduled]) -> list[Run]:
    runs = [Run(item.sampled_rows, item.components) for item in plan if item.samples]
    if reads(plan):
        runs += [Run(len(item.scored), item.components) for item in plan if item.scored]
    return runs


def _padded(
    values: Sequence[int], size: int, dtype: type[np.integer], fill: int = 0
) -> npt.NDArray[np.integer]:
    array = np.full(size, fill, dtype=dtype)
    array[: len(values)] = values
    return array


# (below this many rows, bucket step): a step is padded by an eighth at most, with few graphs
_STEPS = ((64, 8), (128, 16), (1 << 30, 32))


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Row counts, ascending: 1, 2, 4, 8, 16, 24, 32, ... and `most` as the last."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        following = 8 if sizes[-1] == 4 else sizes[-1] + _step(sizes[-1])
        sizes.append(following)
    return (*(size for size in sizes if size < most), most)


def _step(size: int) -> int:
    return next(step for limit, step in _STEPS if size < limit)


class DecodeBuckets:
    """Fixed shapes of decode steps: up to `most` rows, sequences of up to `blocks` blocks."""

    def __init__(self, most: int, blocks: int) -> None:
        self._sizes = bucket_sizes(most)
        self.blocks = blocks  # of a sequence

    def extents(self, *, adapters: bool) -> list[Extent]:
        """All shapes, the largest first."""
        return [self._extent(size, adapters=adapters) for size in reversed(self._sizes)]

    def fit(self, plan: Sequence[Scheduled], *, adapters: bool) -> Extent | None:
        """The smallest shape that holds the plan; None if no graph serves it."""
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
        # Pieces: one adapter per row, doubled for compositions whose rows are cut in several tiles.
        # Small tiles whatever the batch: most have a row or two under one adapter.
        room = Room(size, pieces=2 * size, tiles=size, height=SMALL_TILE) if adapters else None
        return Extent(size, size, size, self.blocks, room, room, room)


def _needed(plan: Sequence[Scheduled]) -> tuple[int, int]:
    """Segments and pieces that a plan needs."""
    segments = pieces = 0
    for components, group in groupby(plan, key=lambda item: item.components):
        rows = sum([item.rows for item in group])
        segments += len(components)
        pieces += len(components) * -(-rows // SMALL_TILE)
    return segments, pieces
