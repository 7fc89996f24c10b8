"""Plan of a drafting call: the rows and numbers of each round, worked out on the host.

A round ends in tokens. Parallel heads need one round for all depths, sequential heads one per
depth, each beginning with the tokens of the round before. A row of a round is one head of one item.
Its logits come in one of three ways:

    module   through the model's LM head: without a vocabulary; or with one if the LM head is no
             plain float matrix or the item's adapters update it: then its columns are picked
    subset   over the vocabulary's rows of the LM head alone
    own      from the head's own LM head

Knows rows and numbers, not what is computed with them (draft_heads.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, Segments
from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadItems, HeadTables
from quickchange_server.adapters.batch_segments import Components, Run, pack, room_for, unpack
from quickchange_server.adapters.turbo_tables import TurboSlot


@dataclass(frozen=True, slots=True)
class DraftItem:
    """One sequence's drafts."""

    row: int  # its sequence's row of the hidden states
    slot: int  # device slot of the heads
    depth: int  # tokens wanted, from 1 to the number of heads
    components: Components  # the request's adapters, which may update the LM head


class HeadAdapters(Protocol):
    """Tables of the adapters on the device."""

    @property
    def wide_tables(self) -> LowRankTables: ...

    @property
    def heads(self) -> HeadTables: ...

    def turbo(self, slot: int) -> TurboSlot | None:
        """The Turbo heads in a slot; None if it has none."""

    def updates(self, slot: int, group: int) -> bool:
        """True if a slot's adapter has an update in a module group."""


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """Properties of the model's LM head that the plan depends on."""

    plain: bool  # it is a float matrix, whose single rows can be read
    group: int | None  # group of adapters' updates of it; None: no adapters


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first blocks of sequential heads, which read a token's embedding beside the state."""

    states: Tensor | None  # int64 [S] rows in the last round's states (first round: hidden states)
    tokens: Tensor  # int64 [S] places of the last round's drafts (first round: rows of `tokens`)
    items: HeadItems  # over the S rows so chosen


@dataclass(frozen=True, slots=True)
class Level:
    """A further block, for the rows of a round that have it."""

    rows: Tensor | None  # int64 [I]; None: all rows
    items: HeadItems


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The drafts that some rows' logits decide, and the tokens of their columns."""

    places: Tensor  # int64 [m] into the drafts [items · depth]
    first: Tensor | None  # int64 [m] begin of each row's vocabulary; None: column i is token i


@dataclass(frozen=True, slots=True)
class Columns:
    """Choice of the vocabularies' columns from rows of all logits."""

    size: Tensor  # int64 [m] of each row's vocabulary
    width: int  # the largest of them


@dataclass(frozen=True, slots=True)
class ModuleLogits:
    """Rows through the model's LM head: first those over all tokens, then the others."""

    rows: Tensor | None  # int64 [m] in the round; None: all
    segments: Segments | None  # adapters over these rows; None: none updates the LM head
    over_all: DraftChoice | None
    over_columns: DraftChoice | None
    columns: Columns | None


@dataclass(frozen=True, slots=True)
class SubsetLogits:
    """Rows through their vocabularies' rows of the LM head."""

    rows: Tensor | None  # int64 [m] in the round; None: all
    segments: Tensor  # int32 [R, 4] (begin, end, first, last), as draft_logits reads them
    width: int
    choice: DraftChoice


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """Rows through LM heads of their own, all of one width."""

    items: HeadItems
    width: int
    choice: DraftChoice


@dataclass(frozen=True, slots=True)
class Round:
    """All that ends in one round of tokens."""

    parallel: HeadItems | None  # first blocks, over the hidden states
    sequential: Beginning | None  # first blocks of the rows behind those
    levels: tuple[Level, ...]
    module: ModuleLogits | None
    subset: SubsetLogits | None
    own: tuple[OwnLogits, ...]


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """All of a drafting call that is known before its hidden states are."""

    items: Sequence[DraftItem]
    rounds: tuple[Round, ...]  # on the host
    vocabularies: Sequence[Tensor]  # on the device
    depth: int  # the largest that an item asks for


@dataclass(frozen=True, slots=True)
class _Row:
    """One head of one item."""

    index: int  # the item's
    item: DraftItem
    turbo: TurboSlot
    depth: int  # the head's, from 0

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.turbo.heads[self.depth]


class Planner:
    """Plan of one drafting call, made on the host.

    Raises ValueError for a slot without heads or a depth that its heads don't have.
    """

    def __init__(
        self,
        items: Sequence[DraftItem],
        adapters: HeadAdapters,
        head: HeadFacts,
        hidden_rows: int,
        device: torch.device,
    ) -> None:
        self._adapters = adapters
        self._head = head
        self._hidden_rows = hidden_rows
        self._device = device  # decides if segments need tiles
        self.depth = max(item.depth for item in items)
        self._items = sorted(
            ((index, item, _turbo(item, adapters)) for index, item in enumerate(items)),
            key=lambda entry: (entry[2].sequential, entry[1].slot, entry[0]),
        )
        self._lists: dict[int, tuple[int, int]] = {}  # slot -> (first, last) of its vocabulary
        self.vocabularies: list[
            Tensor
        ] = []  # int32 on the device; plans number their tokens joined
        for _, item, turbo in self._items:
            self._join_vocabulary(item.slot, turbo)

    def rounds(self) -> tuple[Round, ...]:
        """The rounds of the call, with tensors on the host."""
        sequential = [item.depth for _, item, turbo in self._items if turbo.sequential]
        rounds: list[Round] = []
        before: list[_Row] = []
        for depth in range(max(sequential, default=1)):
            rows = self._rows(depth)
            rounds.append(self._round(rows, before))
            before = rows
        return tuple(rounds)

    def _join_vocabulary(self, slot: int, turbo: TurboSlot) -> None:
        if turbo.vocabulary is not None and slot not in self._lists:
            first = max((last for _, last in self._lists.values()), default=0)
            self._lists[slot] = (first, first + turbo.vocabulary.shape[0])
            self.vocabularies.append(turbo.vocabulary)

    def _rows(self, depth: int) -> list[_Row]:
        """Rows of a round: those of parallel heads, then those of sequential ones, by slot."""
        rows: list[_Row] = []
        for index, item, turbo in self._items:
            if turbo.sequential:
                depths = range(depth, min(depth + 1, item.depth))
            else:
                depths = range(0 if depth else item.depth)
            rows += [_Row(index, item, turbo, own) for own in depths]
        return rows

    def _round(self, rows: Sequence[_Row], before: Sequence[_Row]) -> Round:
        parallel = [row for row in rows if not row.turbo.sequential]
        first = [(row.item.row, row.blocks[0]) for row in parallel]
        module, subset, own = self._by_logits(rows)
        return Round(
            parallel=HeadItems.of(first) if first else None,
            sequential=self._beginning(rows[len(parallel) :], before),
            levels=tuple(_levels(rows)),
            module=self._module(rows, module) if module else None,
            subset=self._subset(rows, subset) if subset else None,
            own=tuple(self._own(rows, own)),
        )

    def _beginning(self, rows: Sequence[_Row], before: Sequence[_Row]) -> Beginning | None:
        if not rows:
            return None
        items = HeadItems.of([(at, row.blocks[0]) for at, row in enumerate(rows)])
        if not before:
            own = [row.item.row for row in rows]
            return Beginning(_chosen(own, self._hidden_rows), torch.tensor(own), items)
        state_of = {row.index: at for at, row in enumerate(before) if row.turbo.sequential}
        states = [state_of[row.index] for row in rows]
        places = [self._place(row) - 1 for row in rows]
        return Beginning(_chosen(states, len(before)), torch.tensor(places), items)

    def _place(self, row: _Row) -> int:
        return row.index * self.depth + row.depth

    def _by_logits(self, rows: Sequence[_Row]) -> tuple[list[int], list[int], list[int]]:
        """Row numbers by the source of their logits: module (those over all first), subset, own."""
        over_all: list[int] = []
        over_columns: list[int] = []
        subset: list[int] = []
        own: list[int] = []
        for at, row in enumerate(rows):
            if row.turbo.outputs:
                own.append(at)
            elif row.turbo.vocabulary is None:
                over_all.append(at)
            elif self._head.plain and not self._updating(row):
                subset.append(at)
            else:
                over_columns.append(at)
        return over_all + over_columns, subset, own

    def _updating(self, row: _Row) -> Components:
        """The row's adapters that update the LM head."""
        group = self._head.group
        if group is None:
            return ()
        return tuple(c for c in row.item.components if self._adapters.updates(c[0], group))

    def _module(self, rows: Sequence[_Row], which: Sequence[int]) -> ModuleLogits:
        chosen = [rows[at] for at in which]
        over_all = [row for row in chosen if row.turbo.vocabulary is None]
        over_columns = chosen[len(over_all) :]
        sizes = [last - first for first, last in self._lists_of(over_columns)]
        return ModuleLogits(
            rows=_chosen(which, len(rows)),
            segments=self._segments(chosen),
            over_all=self._choice(over_all) if over_all else None,
            over_columns=self._choice(over_columns) if over_columns else None,
            columns=Columns(torch.tensor(sizes), max(sizes)) if sizes else None,
        )

    def _segments(self, rows: Sequence[_Row]) -> Segments | None:
        runs = [Run(1, self._updating(row)) for row in rows]
        if not any(run.components for run in runs):
            return None
        room = room_for(runs, self._device)
        return unpack(pack(runs, room), room)

    def _subset(self, rows: Sequence[_Row], which: Sequence[int]) -> SubsetLogits:
        chosen = [rows[at] for at in which]
        segments: list[list[int]] = []
        for at, bounds in enumerate(self._lists_of(chosen)):
            if segments and segments[-1][2:] == [*bounds]:
                segments[-1][1] = at + 1
            else:
                segments.append([at, at + 1, *bounds])
        return SubsetLogits(
            rows=_chosen(which, len(rows)),
            segments=torch.tensor(segments, dtype=torch.int32),
            width=max(last - first for _, _, first, last in segments),
            choice=self._choice(chosen),
        )

    def _own(self, rows: Sequence[_Row], which: Sequence[int]) -> list[OwnLogits]:
        """One part for each width and meaning of the columns."""
        found: dict[tuple[int, bool], list[int]] = {}
        for at in which:
            turbo = rows[at].turbo
            found.setdefault((turbo.columns or 0, turbo.vocabulary is None), []).append(at)
        return [
            OwnLogits(
                HeadItems.of([(at, rows[at].turbo.outputs[rows[at].depth]) for at in places]),
                width,
                self._choice([rows[at] for at in places]),
            )
            for (width, _), places in found.items()
        ]

    def _choice(self, rows: Sequence[_Row]) -> DraftChoice:
        """The choice of some rows, all with a vocabulary or all without."""
        first = [first for first, _ in self._lists_of(rows)]
        return DraftChoice(
            torch.tensor([self._place(row) for row in rows]),
            torch.tensor(first) if first else None,
        )

    def _lists_of(self, rows: Sequence[_Row]) -> list[tuple[int, int]]:
        return [self._lists[row.item.slot] for row in rows if row.item.slot in self._lists]


def _turbo(item: DraftItem, adapters: HeadAdapters) -> TurboSlot:
    turbo = adapters.turbo(item.slot)
    if turbo is None or not 1 <= item.depth <= turbo.depth:
        has = "no heads" if turbo is None else f"{turbo.depth} heads"
        raise ValueError(f"{item.depth} drafts from slot {item.slot}, which has {has}")
    return turbo


def _levels(rows: Sequence[_Row]) -> list[Level]:
    """The blocks behind the first."""
    levels: list[Level] = []
    for level in range(1, max(len(row.blocks) for row in rows)):
        places = [at for at, row in enumerate(rows) if len(row.blocks) > level]
        items = HeadItems.of([(at, rows[at].blocks[level]) for at in places])
        levels.append(Level(_chosen(places, len(rows)), items))
    return levels


def _chosen(rows: Sequence[int], total: int) -> Tensor | None:
    """Rows as a tensor; None where they are all rows in their order, which need no choosing."""
    return None if rows == [*range(total)] else torch.tensor(rows)
