"""Host tensors of a step: the plan as the model reads it, in exact size or padded to a fixed shape.

Padding is harmless by the operations' contracts: rows of slot -1 are not written to the cache,
sequences of length 0 have no queries, segments without rows do nothing. Steps of a fixed shape are
written into the same tensors again and again (`InputWriter`): what a plan leaves as it was is not
written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.batch_segments import Room, Run, pack, unpack
from quickchange_server.engine.inputs.block_tables import TableChanges, TableRows, put
from quickchange_server.engine.inputs.state_inputs import PackedSegments, PartInputs, state_parts
from quickchange_server.engine.inputs.step_shapes import (
    Extent,
    PlanShape,
    head_runs,
    sample_runs,
    token_runs,
)
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.forward_context import AdapterBatch, AttentionBatch, ForwardContext
from quickchange_server.model.virtual_rows import VirtualRows

_NOWHERE = -1  # the slot of a row that is written to no block
_KNOWN = (-1,)  # the feed of a row whose token the host knows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs of a step's forward pass, besides weights, caches and the adapters' tables."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    sample_rows: Tensor  # int64 [R]: sampled rows, then scored, then pooled
    head_rows: int | None  # the LM head reads the first so many of them; None: all
    slots: Tensor  # int64 [T]
    seq_lens: Tensor  # int32 [B]
    query_start: Tensor  # int32 [B + 1]
    tables: Tensor | TableChanges  # int32 [B, M]; or what changes in tables that the device keeps
    tokens: PackedSegments | None
    samples: PackedSegments | None
    head: PackedSegments | None
    states: tuple[PartInputs, ...] = ()  # for models with recurrent layers alone
    # int64 [T]: which of the latest step's sampled tokens is the row's; -1: that in `ids`.
    feed: Tensor | None = None
    reach: Tensor | None = None  # int64 [T], if the model scales positions by the text
    virtual: VirtualRows | None = None  # in steps without a graph alone

    def step(self, tables: LowRankTables | None, kept: Tensor | None = None) -> ForwardContext:
        """The forward context that the model's seams read; all tensors on the model's device.

        tables: the adapters'. kept: the block tables that the device keeps, if `tables` changes
        them.
        """
        adapters = self._adapters(tables)
        states = tuple([part.part(tables, adapters) for part in self.states])
        blocks = self.tables
        if isinstance(blocks, TableChanges):
            if kept is None:
                raise ValueError("changes of block tables without the tables")
            blocks = blocks.applied(kept)
        batch = AttentionBatch(self.slots, blocks, self.seq_lens, self.query_start)
        return ForwardContext(batch, adapters, states, self.reach, self.virtual)

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


def empty_inputs(
    extent: Extent,
    *,
    kept: TableRows | None = None,
    one_kind: bool = True,
    fed: bool = False,
    scaled: bool = False,
    states: tuple[PartInputs, ...] = (),
) -> StepInputs:
    """Inputs of an extent in which nothing is written yet.

    kept: where the block tables are kept on the device; None: the inputs have them. one_kind: every
    row is sampled, so that all segments are the same. fed: rows may have a token that only the
    device knows. scaled: the model needs each row's reach.
    """
    tokens = _room_of(extent.tokens_room)
    samples = tokens if one_kind else _room_of(extent.samples_room)
    head = samples if extent.head_room is extent.samples_room else _room_of(extent.head_room)

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    return StepInputs(
        ids=ints(extent.rows),
        positions=ints(extent.rows),
        sample_rows=ints(extent.samples),
        head_rows=None,
        slots=ints(extent.rows),
        seq_lens=ints(extent.sequences, dtype=torch.int32),
        query_start=ints(extent.sequences + 1, dtype=torch.int32),
        tables=ints(extent.sequences, extent.blocks, dtype=torch.int32)
        if kept is None
        else kept.no_changes(extent.sequences),
        tokens=tokens,
        samples=samples,
        head=head,
        states=states,
        feed=ints(extent.rows) if fed else None,
        reach=ints(extent.rows) if scaled else None,
    )


def step_inputs(
    plan: Sequence[Scheduled],
    shape: PlanShape,
    extent: Extent,
    block_size: int,
    states_on: torch.device | None = None,
    *,
    scaled: bool = False,
    virtual: VirtualRows | None = None,
) -> StepInputs:
    """The plan's tensors on the host, padded to `extent`.

    states_on: the device of a model with recurrent layers; None: it has none. scaled: the model
    needs each row's reach. virtual: what the plan is given of virtual tokens. Raises ValueError if
    the plan is larger.
    """
    one_kind = extent.tokens_room == extent.samples_room and shape.all_sampled
    states = () if states_on is None else state_parts(plan, extent.rows, states_on)
    fed = any(item.sequence.pending for item in plan)
    inputs = empty_inputs(extent, one_kind=one_kind, fed=fed, scaled=scaled, states=states)
    head_rows = InputWriter(inputs, block_size).write(plan, shape)
    head = None if head_rows == extent.samples else head_rows
    return replace(inputs, head_rows=head, virtual=virtual)


class InputWriter:
    """Writes plans into the tensors of one `StepInputs`, except for those of recurrent layers, and
    changes of tables that the device keeps."""

    def __init__(self, inputs: StepInputs, block_size: int) -> None:
        self._block_size = block_size
        self._ids = inputs.ids.numpy()
        self._positions = inputs.positions.numpy()
        self._sample_rows = inputs.sample_rows.numpy()
        self._slots = inputs.slots.numpy()
        self._seq_lens = inputs.seq_lens.numpy()
        self._query_start = inputs.query_start.numpy()
        self._tables = inputs.tables.numpy() if isinstance(inputs.tables, Tensor) else None
        self._feed = None if inputs.feed is None else inputs.feed.numpy()
        self._reach = None if inputs.reach is None else inputs.reach.numpy()
        self._segments = [_KeptSegments(inputs.tokens, token_runs)]
        if inputs.samples is not inputs.tokens:
            self._segments.append(_KeptSegments(inputs.samples, sample_runs))
        if inputs.head is not inputs.samples:
            self._segments.append(_KeptSegments(inputs.head, head_runs))

    def write(self, plan: Sequence[Scheduled], shape: PlanShape) -> int:
        """Write a plan; returns the rows that are sampled or scored: the LM head reads these.

        Raises ValueError if the plan is larger than the tensors.
        """
        size = self._block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        lengths: list[int] = []
        feed: list[int] = []
        for item, count in zip(plan, shape.rows, strict=True):
            sequence, first = item.sequence, item.first
            length = first + count
            if count == 1:
                positions.append(first)
                slots.append(sequence.blocks[first // size] * size + first % size)
            else:
                positions += range(first, length)
                slots += _slots(sequence.blocks, first, count, size)
            known = sequence.ids(first, item.count)
            ids += known
            feed += _KNOWN if count == 1 else _KNOWN * count
            if len(known) < item.count:  # the last is not on the host yet
                ids.append(0)
                feed[-1] = sequence.token_row
            ids += item.drafts
            lengths.append(length)
        rows = len(positions)
        ends = list(accumulate(shape.rows))
        put(self._ids, ids)
        put(self._positions, positions)
        put(self._slots, slots, _NOWHERE)
        put(self._seq_lens, lengths)
        put(self._query_start[1:], ends, rows)
        if self._feed is not None:
            put(self._feed, feed, _KNOWN[0])
        if self._reach is not None:
            least = np.repeat([item.sequence.reach for item in plan], shape.rows)
            put(self._reach, np.maximum(np.array(positions) + 1, least))
        read, head_rows = _rows_read(plan, shape, ends)
        put(self._sample_rows, read)
        if self._tables is not None:
            for row, item in enumerate(plan):
                self._tables[row, : len(item.sequence.blocks)] = item.sequence.blocks
        for segments in self._segments:
            segments.write(plan, shape)
        return head_rows


def _slots(blocks: Sequence[int], first: int, count: int, size: int) -> list[int]:
    """KV slots of `count` rows of a sequence: block · block size + offset."""
    begin = first // size
    own = np.array(blocks[begin : (first + count - 1) // size + 1], dtype=np.int64)
    block, offset = np.divmod(np.arange(first - begin * size, first - begin * size + count), size)
    slots: list[int] = (own[block] * size + offset).tolist()
    return slots


def _rows_read(
    plan: Sequence[Scheduled], shape: PlanShape, ends: Sequence[int]
) -> tuple[Sequence[int], int]:
    """Rows that are sampled, then scored, then pooled; the number of the first two."""
    if shape.all_sampled:
        return range(ends[-1] if ends else 0), shape.samples
    rows: list[int] = []
    for end, count in zip(ends, shape.sampled, strict=True):
        rows += range(end - count, end)
    if not shape.reads:
        return rows, len(rows)
    rows += _rows_at(plan, ends, [item.scored for item in plan])
    head_rows = len(rows)
    rows += _rows_at(plan, ends, [item.pooled for item in plan])
    return rows, head_rows


class _KeptSegments:
    """Packed segments, written where the rows' adapters have changed since the last time."""

    def __init__(
        self, into: PackedSegments | None, runs: Callable[[Sequence[Scheduled]], list[Run]]
    ) -> None:
        self._into = into
        self._runs = runs
        self._written: PlanShape | None = None

    def write(self, plan: Sequence[Scheduled], shape: PlanShape) -> None:
        if self._into is None or (not shape.reads and shape == self._written):
            return
        self._into.packed.copy_(pack(self._runs(plan), self._into.room))
        self._written = shape


def _room_of(room: Room | None) -> PackedSegments | None:
    if room is None:
        return None
    return PackedSegments(torch.zeros(sum(room.sizes), dtype=torch.int32), room)


def _rows_at(
    plan: Sequence[Scheduled], ends: Sequence[int], positions: Sequence[range]
) -> list[int]:
    """Rows of the step at the given positions of each sequence."""
    rows: list[int] = []
    for item, end, wanted in zip(plan, ends, positions, strict=True):
        shift = end - item.rows - item.first
        rows += range(wanted.start + shift, wanted.stop + shift) if wanted else ()
    return rows
