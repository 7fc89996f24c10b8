"""Inputs of recurrent layers in a step: which rows they compute together, and whose states.

Rows of one sequence behind one another are a call of their own; sequences with one row each share
one. Padding takes the zero state and leaves its own where nobody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.batch_segments import Room, pack, room_for, unpack
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.forward_context import (
    SPARE_STATE,
    ZERO_STATE,
    AdapterBatch,
    StatePart,
)


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


def one_row_each(plan: Sequence[Scheduled]) -> bool:
    """True if recurrent layers compute all of the plan in one call, in a shape that is fixed."""
    return all(item.rows == 1 for item in plan)


def state_parts(
    plan: Sequence[Scheduled], rows: int, device: torch.device
) -> tuple[PartInputs, ...]:
    """Rows that recurrent layers compute together, in order: one row of each sequence, if no one
    has more; else each chunk alone, then all lone rows, then all first drafts, and so on."""
    starts = list(accumulate([item.rows for item in plan], initial=0))[:-1]
    if one_row_each(plan):
        lone = [_lone_row(item, start) for item, start in zip(plan, starts, strict=True)]
        return (_part(lone, None, rows),)
    groups: list[list[_Rows]] = []
    depths: list[list[_Rows]] = [[] for _ in range(1 + max(len(item.drafts) for item in plan))]
    for item, start in zip(plan, starts, strict=True):
        if item.count > 1:
            groups += [[rows] for rows in _chunk(item, start)]
        else:
            depths[0].append(_lone_row(item, start))
        states = _states_before_drafts(item)
        for depth in range(1, 1 + len(item.drafts)):
            behind = item.count + depth - 1
            before, after = states[depth - 1], states[depth]
            row = _Rows(item, start + behind, item.first + behind, 1, before, after)
            depths[depth].append(row)
    groups += [rows for rows in depths if rows]
    return tuple([_part(group, None if len(groups) == 1 else device) for group in groups])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one sequence in a part; state rows of what is before them and what is after."""

    item: Scheduled
    first: int  # of the step's rows
    position: int  # in its text
    count: int
    read: int
    write: int


def _lone_row(item: Scheduled, row: int) -> _Rows:
    return _Rows(item, row, item.first, 1, item.sequence.state, item.sequence.states[0])


def _chunk(item: Scheduled, start: int) -> Iterator[_Rows]:
    """Scheduled rows of a sequence, up to a state that is to be kept and behind it."""
    sequence = item.sequence
    read, position, left = sequence.state, item.first, item.count
    if sequence.border is not None:
        before = sequence.border.tokens - item.first
        yield _Rows(item, start, position, before, read, sequence.border.row)
        start, left, read = start + before, left - before, sequence.border.row
        position += before
    if left:
        yield _Rows(item, start, position, left, read, sequence.states[0])


def _states_before_drafts(item: Scheduled) -> list[int]:
    """State rows after the last scheduled row and after each draft."""
    sequence = item.sequence
    border = sequence.border
    if border is not None and border.tokens == item.first + item.count:
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
    runs = [
        run for rows in group for run in rows.item.runs(rows.position, rows.position + rows.count)
    ]
    tokens = None
    if any(run.components for run in runs):
        room = room_for(runs, device)
        tokens = PackedSegments(pack(runs, room), room)
    return replace(inputs, rows=torch.from_numpy(places), tokens=tokens)


def _padded(
    values: Sequence[int], size: int, dtype: type[np.integer], fill: int = 0
) -> npt.NDArray[np.integer]:
    array = np.full(size, fill, dtype=dtype)
    array[: len(values)] = values
    return array
