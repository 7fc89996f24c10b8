"""The plain torch versions of lowrank_, lowrank_embedding_ and lowrank_experts_, for any device.

Short segments go together: their pages are gathered and multiplied as one batch. A long segment is
worth matrix products of its own. Row ranges and page tables are read on the host, so on an
accelerator each call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quickchange_kernels.index_checks import check_indices, check_ranges
from quickchange_kernels.lowrank.lowrank_tables import RANKS_PER_PAGE, PageKind

_PAIRS_AT_ONCE = 256  # (row, page) pairs whose pages are gathered together
MAX_SHORT_ROWS = 4  # a segment of more rows is worth a matrix product of its own

_ACTIVATIONS: Mapping[PageKind, Callable[[Tensor], Tensor]] = {
    PageKind.RELU: functional.relu,
    PageKind.GELU: functional.gelu,
    PageKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    PageKind.SILU: functional.silu,
    PageKind.TANH: torch.tanh,
}


class _Down(Protocol):
    """A x of a linear or of an embedding."""

    def pairs(self, rows: Tensor, a_offsets: Tensor) -> Tensor:
        """Row i through page i: [n, 8] float32."""

    def block(self, begin: int, end: int, a_offsets: Tensor) -> Tensor:
        """Rows [begin, end) through every page: [rows, 8 * pages] float32."""


@dataclass(frozen=True)
class _LinearDown:
    x: Tensor  # [T, K]
    arena: Tensor
    y_per_x: int = 1  # neighbouring rows of y that read one of x

    def pairs(self, rows: Tensor, a_offsets: Tensor) -> Tensor:
        features = self.x.shape[1]
        a = _gather(self.arena, a_offsets, 8 * features).view(-1, 8, features)
        return torch.bmm(a, self.x[rows // self.y_per_x].float().unsqueeze(2)).squeeze(2)

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
    kind: Tensor


def activated(h: Tensor, kind: Tensor) -> Tensor:
    """Each element of h through the activation of its page. kind broadcasts to h's shape."""
    for value, function in _ACTIVATIONS.items():
        chosen = kind == value
        if chosen.any():
            h = torch.where(chosen, function(h), h)
    return h


def plain_lowrank_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    directory: Tensor,
    pages: Tensor,
    page_scale: Tensor,
    page_shift: Tensor,
    page_kind: Tensor,
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    pieces: Tensor | None,
    tiles: Tensor | None,
    tile_height: int,
    group: int,
    most_pages: int,
    aligned: bool,
) -> None:
    """lowrank_ with its tables and segments spread out, as the dispatcher wants them."""
    del pieces, tiles, tile_height, most_pages, aligned  # a GPU's grid alone needs them
    tables = _Pages(arena, pages, page_scale, page_shift, page_kind)
    live = rows[:, 0] != rows[:, 1]
    rows, weight = rows[live], weight[live]
    ranges = _checked_ranges(y, directory, slot[live], group, rows, tables, x.shape[1])
    _add_updates(y, _LinearDown(x, arena), tables, ranges, rows, weight)


def plain_lowrank_embedding_(
    y: Tensor,
    ids: Tensor,
    arena: Tensor,
    directory: Tensor,
    pages: Tensor,
    page_scale: Tensor,
    page_shift: Tensor,
    page_kind: Tensor,
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    pieces: Tensor | None,
    tiles: Tensor | None,
    tile_height: int,
    group: int,
    most_pages: int,
    aligned: bool,
    vocabulary: int,
) -> None:
    """lowrank_embedding_ with its tables and segments spread out."""
    del pieces, tiles, tile_height, most_pages, aligned
    tables = _Pages(arena, pages, page_scale, page_shift, page_kind)
    live = rows[:, 0] != rows[:, 1]
    rows, weight = rows[live], weight[live]
    ranges = _checked_ranges(y, directory, slot[live], group, rows, tables, vocabulary)
    for (begin, end), (first, last) in zip(rows.tolist(), ranges.tolist(), strict=True):
        if first < last:
            check_indices("lowrank: ids", ids[begin:end], vocabulary)
    _add_updates(y, _EmbeddingDown(ids, arena, vocabulary), tables, ranges, rows, weight)


def plain_lowrank_experts_(
    y: Tensor,
    x: Tensor,
    expert: Tensor,
    choices: int,
    experts: int,
    arena: Tensor,
    directory: Tensor,
    pages: Tensor,
    page_scale: Tensor,
    page_shift: Tensor,
    page_kind: Tensor,
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    pieces: Tensor | None,
    tiles: Tensor | None,
    tile_height: int,
    group: int,
    most_pages: int,
    aligned: bool,
) -> None:
    """lowrank_experts_ with its tables and segments spread out."""
    del pieces, tiles, tile_height, most_pages, aligned
    tables = _Pages(arena, pages, page_scale, page_shift, page_kind)
    _check_routing(y, x, expert, choices)
    check_ranges("lowrank: segments.rows", rows, y.shape[0] // choices)
    check_indices("lowrank: segments.slot", slot, directory.shape[0])
    check_indices("lowrank: group", torch.tensor([group, group + experts - 1]), directory.shape[1])
    place, segment = _places(rows[:, 0] * choices, (rows[:, 1] - rows[:, 0]) * choices)
    check_indices("lowrank: expert", expert[place], experts)
    ranges = directory[slot[segment].long(), group + expert[place]]
    used = ranges[ranges[:, 0] != ranges[:, 1]].unique(dim=0)
    check_ranges("lowrank: directory", used, tables.pages.shape[0])
    for first, last in used.tolist():
        _check_pages(tables, slice(first, last), x.shape[1], y.shape[1])
    page, which = _places(ranges[:, 0], ranges[:, 1] - ranges[:, 0])
    total = torch.zeros_like(y, dtype=torch.float32)
    down = _LinearDown(x, arena, y.shape[0] // x.shape[0])
    for few in torch.arange(page.shape[0], device=y.device).split(_PAIRS_AT_ONCE):
        row = place[which[few]]
        _add_pairs(total, down, tables, row, page[few], weight[segment[which[few]]])
    y[place] = (y[place].float() + total[place]).to(y.dtype)


def _check_routing(y: Tensor, x: Tensor, expert: Tensor, choices: int) -> None:
    if not (
        choices > 0
        and expert.shape == y.shape[:1]
        and y.shape[0] % choices == 0
        and y.shape[0] in (x.shape[0], x.shape[0] * choices)
    ):
        raise ValueError(
            f"lowrank: y has {y.shape[0]} rows, x {x.shape[0]} and expert {expert.shape[0]} for "
            f"{choices} choices a token"
        )


def _places(begins: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Every place in the ranges from `begins` on, range after range; and each one's range."""
    lengths = lengths.long()
    which = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    offset = torch.arange(which.shape[0], device=which.device) - before[which]
    return begins[which].long() + offset, which


def _checked_ranges(
    y: Tensor,
    directory: Tensor,
    slot: Tensor,
    group: int,
    rows: Tensor,
    tables: _Pages,
    features: int,
) -> Tensor:
    """Each segment's pages [S, 2]. Raises IndexError for what lies outside y, tables or arena."""
    check_ranges("lowrank: segments.rows", rows, y.shape[0])
    check_indices("lowrank: segments.slot", slot, directory.shape[0])
    check_indices("lowrank: group", torch.tensor([group]), directory.shape[1])
    ranges = directory[slot.long(), group]
    used = ranges[ranges[:, 0] != ranges[:, 1]]
    check_ranges("lowrank: directory", used, tables.pages.shape[0])
    for first, last in used.tolist():
        _check_pages(tables, slice(first, last), features, y.shape[1])
    return ranges


def _check_pages(tables: _Pages, used: slice, features: int, columns: int) -> None:
    a, b, column, width = tables.pages[used].unbind(1)
    kind, room = tables.kind[used], tables.arena.numel()
    check_indices("lowrank: page_kind", kind, len(PageKind))
    check_indices("lowrank: pages' column", column, columns + 1)
    check_indices("lowrank: pages' width", width, columns + 1)
    check_ranges("lowrank: pages' columns", torch.stack([column, column + width], 1), columns)
    gain = kind == PageKind.GAIN
    length = torch.where(gain, 1, RANKS_PER_PAGE) * width
    check_indices("lowrank: pages' B", b, room + 1)
    check_ranges("lowrank: pages' B", torch.stack([b, b + length], 1), room)
    check_indices("lowrank: pages' A", a[~gain], room + 1)
    from_a = a[~gain]
    check_ranges(
        "lowrank: pages' A", torch.stack([from_a, from_a + RANKS_PER_PAGE * features], 1), room
    )


@dataclass(frozen=True)
class _Span:
    """A segment and its pages, on the host."""

    begin: int  # token rows [begin, end)
    end: int
    weight: float
    updates: list[int]  # pages with an A
    gains: list[int]  # pages without one

    @property
    def short(self) -> bool:
        return self.end - self.begin <= MAX_SHORT_ROWS


def _spans(tables: _Pages, ranges: Tensor, rows: Tensor, weight: Tensor) -> list[_Span]:
    """The segments that have rows and pages. ranges [S, 2]: each segment's pages."""
    gains = set((tables.kind == PageKind.GAIN).nonzero().flatten().tolist())
    return [
        _Span(
            begin,
            end,
            w,
            [page for page in range(first, last) if page not in gains],
            [page for page in range(first, last) if page in gains],
        )
        for (begin, end), (first, last), w in zip(
            rows.tolist(), ranges.tolist(), weight.tolist(), strict=True
        )
        if begin < end and first < last
    ]


def _add_updates(
    y: Tensor, down: _Down, tables: _Pages, ranges: Tensor, rows: Tensor, weight: Tensor
) -> None:
    """Add all updates to y, in place. ranges [S, 2]: each segment's pages."""
    spans = _spans(tables, ranges, rows, weight)
    if not spans:
        return
    # Summed apart from y, which may be x and which gains multiply; in float32, because a lower
    # precision would round once a page.
    total = torch.zeros_like(y, dtype=torch.float32)
    if short := [span for span in spans if span.short and span.updates]:
        _add_short(total, down, tables, short)
    touched = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)
    for span in spans:
        touched[span.begin : span.end] = True
        _add_gains(total, y, tables, span)
        if not span.short and span.updates:
            _add_long(total, down, tables, span)
    y[touched] = (y[touched].float() + total[touched]).to(y.dtype)


def _add_gains(total: Tensor, y: Tensor, tables: _Pages, span: _Span) -> None:
    for page in span.gains:
        _, b_offset, column, width = tables.pages[page].tolist()
        gain = tables.arena[b_offset : b_offset + width].float() * tables.scale[page] * span.weight
        place = (slice(span.begin, span.end), slice(column, column + width))
        total[place] += y[place].float() * gain


def _add_short(total: Tensor, down: _Down, tables: _Pages, spans: list[_Span]) -> None:
    """Every (row, page) pair of the spans in one batch."""
    pairs = [
        (row, page, span.weight)
        for span in spans
        for page in span.updates
        for row in range(span.begin, span.end)
    ]
    device = total.device
    row = torch.tensor([pair[0] for pair in pairs], device=device)
    page = torch.tensor([pair[1] for pair in pairs], device=device)
    weight = torch.tensor([pair[2] for pair in pairs], device=device)
    _add_pairs(total, down, tables, row, page, weight)


def _add_pairs(
    total: Tensor, down: _Down, tables: _Pages, row: Tensor, page: Tensor, weight: Tensor
) -> None:
    """Row i through page i at weight i, for all of them [n]."""
    device = total.device
    table = tables.pages[page]  # [n, 4]
    h = down.pairs(row, table[:, 0]) + tables.shift[page]  # [n, 8]
    h = activated(h, tables.kind[page].unsqueeze(1)) * (weight * tables.scale[page]).unsqueeze(1)
    for (column, width), members in _by_place(table).items():
        chosen = torch.tensor(members, device=device)
        b = _gather(tables.arena, table[chosen, 1], 8 * width).view(-1, 8, width)
        update = torch.bmm(h[chosen].unsqueeze(1), b).squeeze(1)  # [n, width]
        total[:, column : column + width].index_add_(0, row[chosen], update)


def _add_long(total: Tensor, down: _Down, tables: _Pages, span: _Span) -> None:
    """One segment through all its pages."""
    pages = torch.tensor(span.updates, device=total.device)
    table = tables.pages[pages]
    h = down.block(span.begin, span.end, table[:, 0])  # [rows, 8 * pages]
    h = h.view(h.shape[0], -1, 8) + tables.shift[pages]
    h = activated(h, tables.kind[pages].unsqueeze(1))
    h = h * (span.weight * tables.scale[pages]).unsqueeze(1)
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
