"""The plain torch versions of lowrank_ and lowrank_embedding_, for any device.

Short segments go together: their pages are gathered and multiplied as one batch. A long segment is
worth matrix products of its own. Row ranges and page tables are read on the host, so on an
accelerator each call waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_SHORT_ROWS = 4  # a segment of more rows is worth a matrix product of its own


class _Down(Protocol):
    """A x, for the two kinds of module."""

    def pairs(self, rows: Tensor, a_offsets: Tensor) -> Tensor:
        """Row i through page i: [n, 8] float32."""

    def block(self, begin: int, end: int, a_offsets: Tensor) -> Tensor:
        """Rows [begin, end) through every page: [rows, 8 * pages] float32."""


@dataclass(frozen=True)
class _LinearDown:
    x: Tensor  # [T, K]
    arena: Tensor

    def pairs(self, rows: Tensor, a_offsets: Tensor) -> Tensor:
        features = self.x.shape[1]
        a = _gather(self.arena, a_offsets, 8 * features).view(-1, 8, features)
        return torch.bmm(a, self.x[rows].float().unsqueeze(2)).squeeze(2)

    def block(self, begin: int, end: int, a_offsets: Tensor) -> Tensor:
        features = self.x.shape[1]
        a = _gather(self.arena, a_offsets, 8 * features).view(-1, features)
        return self.x[begin:end].float() @ a.T


@dataclass(frozen=True)
class _EmbeddingDown:
    ids: Tensor  # int64 [T]
    arena: Tensor
    vocabulary: int

    def pairs(self, rows: Tensor, a_offsets: Tensor) -> Tensor:
        return self.arena[self._row_starts(a_offsets) + self.ids[rows].unsqueeze(1)].float()

    def block(self, begin: int, end: int, a_offsets: Tensor) -> Tensor:
        starts = self._row_starts(a_offsets).view(1, -1)
        return self.arena[starts + self.ids[begin:end].unsqueeze(1)].float()

    def _row_starts(self, a_offsets: Tensor) -> Tensor:
        ranks = torch.arange(8, device=a_offsets.device) * self.vocabulary
        return a_offsets.unsqueeze(1) + ranks  # [n, 8]


@dataclass(frozen=True)
class _Pages:
    """The page tables, on the device."""

    arena: Tensor
    pages: Tensor
    scale: Tensor
    shift: Tensor


def plain_lowrank_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    directory: Tensor,
    pages: Tensor,
    page_scale: Tensor,
    page_shift: Tensor,
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    group: int,
) -> None:
    """lowrank_ with its tables and segments spread out, as the dispatcher wants them."""
    tables = _Pages(arena, pages, page_scale, page_shift)
    ranges = directory[slot.long(), group]
    _add_updates(y, _LinearDown(x, arena), tables, ranges, rows, weight)


def plain_lowrank_embedding_(
    y: Tensor,
    ids: Tensor,
    arena: Tensor,
    directory: Tensor,
    pages: Tensor,
    page_scale: Tensor,
    page_shift: Tensor,
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    group: int,
    vocabulary: int,
) -> None:
    """lowrank_embedding_ with its tables and segments spread out."""
    tables = _Pages(arena, pages, page_scale, page_shift)
    ranges = directory[slot.long(), group]
    _add_updates(y, _EmbeddingDown(ids, arena, vocabulary), tables, ranges, rows, weight)


@dataclass(frozen=True)
class _Span:
    """A segment and its pages, on the host."""

    begin: int  # token rows [begin, end)
    end: int
    first: int  # pages [first, last)
    last: int
    weight: float

    @property
    def short(self) -> bool:
        return self.end - self.begin <= MAX_SHORT_ROWS


def _add_updates(
    y: Tensor, down: _Down, tables: _Pages, ranges: Tensor, rows: Tensor, weight: Tensor
) -> None:
    """ranges [S, 2]: each segment's pages."""
    spans = [
        _Span(begin, end, first, last, w)
        for (begin, end), (first, last), w in zip(
            rows.tolist(), ranges.tolist(), weight.tolist(), strict=True
        )
        if begin < end and first < last
    ]
    # A lower precision would round once a page: the sum is kept apart, in float32.
    total = y if y.dtype == torch.float32 else torch.zeros_like(y, dtype=torch.float32)
    if short := [span for span in spans if span.short]:
        _add_short(total, down, tables, short)
    for span in spans:
        if not span.short:
            _add_long(total, down, tables, span)
    if spans and total is not y:
        touched = sorted({row for span in spans for row in range(span.begin, span.end)})
        index = torch.tensor(touched, device=y.device)
        y[index] = (y[index].float() + total[index]).to(y.dtype)


def _add_short(total: Tensor, down: _Down, tables: _Pages, spans: list[_Span]) -> None:
    """Every (row, page) pair of the spans in one batch."""
    pairs = [
        (row, page, span.weight)
        for span in spans
        for page in range(span.first, span.last)
        for row in range(span.begin, span.end)
    ]
    device = total.device
    row = torch.tensor([pair[0] for pair in pairs], device=device)
    page = torch.tensor([pair[1] for pair in pairs], device=device)
    weight = torch.tensor([pair[2] for pair in pairs], device=device)
    table = tables.pages[page]  # [n, 4]
    scale = (weight * tables.scale[page]).unsqueeze(1)
    h = (down.pairs(row, table[:, 0]) + tables.shift[page]) * scale  # [n, 8]
    for (column, width), members in _by_place(table).items():
        chosen = torch.tensor(members, device=device)
        b = _gather(tables.arena, table[chosen, 1], 8 * width).view(-1, 8, width)
        update = torch.bmm(h[chosen].unsqueeze(1), b).squeeze(1)  # [n, width]
        total[:, column : column + width].index_add_(0, row[chosen], update)


def _add_long(total: Tensor, down: _Down, tables: _Pages, span: _Span) -> None:
    """One segment through all its pages."""
    table = tables.pages[span.first : span.last]
    shift = tables.shift[span.first : span.last]
    scale = (span.weight * tables.scale[span.first : span.last]).unsqueeze(1).expand(-1, 8)
    h = down.block(span.begin, span.end, table[:, 0])  # [rows, 8 * pages]
    h = ((h + shift.reshape(-1)) * scale.reshape(-1)).view(h.shape[0], -1, 8)
    for (column, width), members in _by_place(table).items():
        chosen = torch.tensor(members, device=total.device)
        b = _gather(tables.arena, table[chosen, 1], 8 * width).view(-1, width)
        place = total[span.begin : span.end, column : column + width]
        place.addmm_(h[:, chosen].flatten(1), b)


def _by_place(table: Tensor) -> dict[tuple[int, int], list[int]]:
    """Rows of a page table by (column, width)."""
    places: dict[tuple[int, int], list[int]] = {}
    for index, (_, _, column, width) in enumerate(table.tolist()):
        places.setdefault((column, width), []).append(index)
    return places


def _gather(arena: Tensor, offsets: Tensor, length: int) -> Tensor:
    """[n, length] float32: arena[offset : offset + length] for each offset."""
    return arena[offsets.unsqueeze(1) + torch.arange(length, device=arena.device)].float()
