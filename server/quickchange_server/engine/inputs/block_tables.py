"""Block tables that stay on the device: a step sends what changes in them, not the whole.

A table of 64 sequences of up to 131,072 tokens has half a million entries, of which a decode step
changes four. A sequence keeps its row of the table from step to step, and a step's tables are
gathered from the rows of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_server.model.input_buffers import upload

_CHANGES = 512  # blocks that a step sends with its other inputs, and
_CHANGES_A_SEQUENCE = 8


@dataclass(frozen=True, slots=True)
class TableChanges:
    """Entries of the kept tables that a step writes, and the rows that its sequences have."""

    places: Tensor  # int64 [C], into the flattened tables; unused ones stand behind the last row
    blocks: Tensor  # int32 [C]
    rows: Tensor  # int64 [B]

    def applied(self, kept: Tensor) -> Tensor:
        """Write the changes to the kept tables; returns the step's own, int32 [B, M]."""
        kept.view(-1).index_copy_(0, self.places, self.blocks)
        return kept.index_select(0, self.rows)


@dataclass(slots=True)
class _Row:
    row: int
    blocks: list[int]
    written: int = 0  # so many of them are on the device, or on their way


class TableRows:
    """The tables that one device keeps, and the host's knowledge of what is in them.

    A sequence is known by its list of blocks, which is only ever appended to, or replaced.
    """

    def __init__(self, sequences: int, blocks: int, device: torch.device) -> None:
        self._sequences = sequences
        self._width = max(blocks, 1)
        self._spare = sequences * self._width  # place of changes that change nothing
        self._held: dict[int, _Row] = {}  # by the list's identity
        self._free = list(reversed(range(sequences)))
        # int32 [sequences + 1, blocks]; the last row is nobody's
        self.tables = torch.zeros(sequences + 1, self._width, dtype=torch.int32, device=device)

    def no_changes(self, sequences: int) -> TableChanges:
        """Host tensors for the changes of steps of so many sequences."""
        count = _CHANGES + _CHANGES_A_SEQUENCE * sequences
        return TableChanges(
            torch.full((count,), self._spare, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int32),
            torch.zeros(sequences, dtype=torch.int64),
        )

    def write(self, sequences: Sequence[list[int]], into: TableChanges) -> None:
        """Write the changes for a step of these sequences, which must then run.

        Changes beyond the room that `into` has are sent at once, in a transfer of their own.
        """
        rows: list[int] = []
        places: list[int] = []
        blocks: list[int] = []
        for now in sequences:
            own = self._held.get(id(now))
            if own is None:
                own = self._placed(now, sequences)
            count = len(now)
            if own.written < count:
                if count > self._width:
                    raise ValueError(f"{count} blocks for a block table of {self._width}")
                begin = own.row * self._width
                places += range(begin + own.written, begin + count)
                blocks += now[own.written :]
                own.written = count
            rows.append(own.row)
        room = len(into.places)
        if len(places) > room:
            self._send(places[room:], blocks[room:])
        put(into.rows.numpy(), rows)
        put(into.places.numpy(), places[:room], self._spare)
        put(into.blocks.numpy(), blocks[:room])

    def _placed(self, blocks: list[int], present: Sequence[list[int]]) -> _Row:
        """A row for a new sequence; those of sequences that are not present are taken back."""
        if not self._free:
            kept = {id(each) for each in present}
            gone = [key for key in self._held if key not in kept]
            self._free += [self._held.pop(key).row for key in gone]
        if not self._free:
            raise ValueError(f"more than {self._sequences} sequences in a step with kept tables")
        own = self._held[id(blocks)] = _Row(self._free.pop(), blocks)
        return own

    def _send(self, places: list[int], blocks: list[int]) -> None:
        changes = torch.tensor(places), torch.tensor(blocks, dtype=torch.int32)
        self.tables.view(-1).index_copy_(0, *upload(changes, self.tables.device))


def put(
    column: npt.NDArray[Any], values: Sequence[float] | npt.NDArray[Any], fill: float = 0
) -> None:
    """Write values at a column's beginning, and `fill` behind them. Raises ValueError for too
    many."""
    count = len(values)
    if count > len(column):
        raise ValueError(f"{count} values for a step's column of {len(column)}: take a larger one")
    column[:count] = values
    column[count:] = fill
