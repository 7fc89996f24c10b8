"""lowrank_: add every row's low-rank updates to a linear's or an embedding's output, in one call.

    y[rows_s, column : column + width] += weight_s · scale_p · act_p(x[rows_s] A_pᵀ + shift_p) B_p

for each segment s and each page p of (slot_s, group). A page is 8 ranks of one update; an update of
rank r is ⌈r/8⌉ pages, the last one zero-padded, so ranks mix freely and nothing is padded further.
act_p is the page's kind: the identity, or an activation (bottleneck adapters). A page of the kind
GAIN (DoRA, IA3) has no A, and one row g of B; its update is, with y as it was before the call,

    y[rows_s, column : column + width] += weight_s · scale_p · g_p ⊙ y₀[rows_s, column : ...]

Contract
    y    [T, N]  rows contiguous (any row stride); written in place
    x    [T, K]  lowrank_: y's dtype, rows contiguous (any row stride). May be y itself, for an
                 adapter that reads the output it adds to: all reads of x come before any write of
                 y. May not overlap y otherwise
    ids  int64 [T]  lowrank_embedding_: the tokens; A x is column ids[t] of A [8, vocabulary]
Several segments may cover the same rows (compositions add up). A row in no segment is neither
written nor read, and costs nothing. No segments: the call returns at once. Sums are in float32.
The native version adds to a row in the order of segments, then pages, whatever the other rows are,
so that a row's result does not depend on the batch it is in, within the shapes it takes. The Triton
version sums a row's features, pieces and pages in an order of its own that the batch does not
change either; it needs `segments.tiles`.

lowrank_experts_ does the same for the rows that a router makes of tokens. Each token has `choices`
neighbouring rows of y, and row p is for expert `expert[p]`: it takes the pages of (slot,
group + expert[p]), so that neighbouring groups are the experts of one product. No page of an expert
is a GAIN.
    y       [T · choices, N]
    x       [T · choices, K], or [T, K]: one row for all of a token's choices
    expert  int64 [T · choices]
Segments lie over tokens, as everywhere else.

Rows, slots, pages, experts and tokens out of range raise IndexError on a CPU, before anything is
written; on a GPU, where no launcher looks at device data, they must not occur. Knows nothing of
adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.lowrank import lowrank_plain
from quickchange_kernels.lowrank.lowrank_tables import (
    A_ALIGNMENT,
    RANKS_PER_PAGE,
    GroupShape,
    LowRankTables,
    PageKind,
    RowTiles,
    Segments,
)

__all__ = [
    "A_ALIGNMENT",
    "RANKS_PER_PAGE",
    "GroupShape",
    "LowRankTables",
    "PageKind",
    "RowTiles",
    "Segments",
    "lowrank_",
    "lowrank_embedding_",
    "lowrank_experts_",
    "operands",
    "operands_experts",
    "reference_lowrank",
    "reference_lowrank_embedding",
    "reference_lowrank_experts",
]


def reference_lowrank(
    y: Tensor, x: Tensor, tables: LowRankTables, segments: Segments, group: int
) -> Tensor:
    """y after the operation, in float64: [T, N]."""

    def down(begin: int, end: int, page: int) -> Tensor:
        return x[begin:end].double() @ _matrix(tables, page, 0, RANKS_PER_PAGE, x.shape[1]).T

    return _reference(y, down, tables, segments, group)


def reference_lowrank_embedding(
    y: Tensor,
    ids: Tensor,
    tables: LowRankTables,
    segments: Segments,
    group: int,
    vocabulary: int,
) -> Tensor:
    """y after the operation, in float64: [T, H]."""

    def down(begin: int, end: int, page: int) -> Tensor:
        return _matrix(tables, page, 0, RANKS_PER_PAGE, vocabulary)[:, ids[begin:end]].T

    return _reference(y, down, tables, segments, group)


def reference_lowrank_experts(
    y: Tensor,
    x: Tensor,
    expert: Tensor,
    choices: int,
    tables: LowRankTables,
    segments: Segments,
    group: int,
) -> Tensor:
    """y after the operation, in float64: [T · choices, N]."""
    out, y_per_x = y.double().clone(), y.shape[0] // x.shape[0]
    for row, e in enumerate(expert.tolist()):
        for begin, end, weight, page in _updates(tables, segments, group + e):
            if begin <= row // choices < end:
                _, _, column, width = tables.pages[page].tolist()
                a = _matrix(tables, page, 0, RANKS_PER_PAGE, x.shape[1])
                h = a @ x[row // y_per_x].double() + tables.page_shift[page].double()
                h = lowrank_plain.activated(h, tables.page_kind[page])
                update = h @ _matrix(tables, page, 1, RANKS_PER_PAGE, width)
                out[row, column : column + width] += (
                    weight * tables.page_scale[page].double() * update
                )
    return out


def _reference(
    y: Tensor,
    down: Callable[[int, int, int], Tensor],
    tables: LowRankTables,
    segments: Segments,
    group: int,
) -> Tensor:
    """y after the operation. down(begin, end, page): A x of these rows, [rows, 8]."""
    before, out = y.double(), y.double().clone()
    for begin, end, weight, page in _updates(tables, segments, group):
        _, _, column, width = tables.pages[page].tolist()
        kind = PageKind(int(tables.page_kind[page]))
        place = (slice(begin, end), slice(column, column + width))
        if kind is PageKind.GAIN:
            update = before[place] * _matrix(tables, page, 1, 1, width)
        else:
            h = down(begin, end, page) + tables.page_shift[page].double()
            update = lowrank_plain.activated(h, torch.tensor(kind)) @ _matrix(
                tables, page, 1, RANKS_PER_PAGE, width
            )
        out[place] += weight * tables.page_scale[page].double() * update
    return out


def _updates(
    tables: LowRankTables, segments: Segments, group: int
) -> list[tuple[int, int, float, int]]:
    """(begin, end, weight, page) of every page of every segment."""
    spans = zip(
        segments.rows.tolist(), segments.slot.tolist(), segments.weight.tolist(), strict=True
    )
    return [
        (begin, end, weight, page)
        for (begin, end), slot, weight in spans
        for page in range(*tables.directory[slot, group].tolist())
    ]


def _matrix(tables: LowRankTables, page: int, which: int, rows: int, columns: int) -> Tensor:
    """A page's A (which = 0) or B (1) in float64: [rows, columns]."""
    offset = int(tables.pages[page, which])
    return tables.arena[offset : offset + rows * columns].view(rows, columns).double()


_TABLES = (
    "Tensor arena, Tensor directory, Tensor pages, Tensor page_scale, Tensor page_shift, "
    "Tensor page_kind, Tensor rows, Tensor slot, Tensor weight, Tensor? pieces, Tensor? tiles, "
    "int tile_height, int group, int most_pages, bool aligned"
)
_lowrank_ = dispatch.declare(
    "lowrank_",
    f"(Tensor(a!) y, Tensor x, {_TABLES}) -> ()",
    lowrank_plain.plain_lowrank_,
    dispatch.writes_in_place,
)
_lowrank_embedding_ = dispatch.declare(
    "lowrank_embedding_",
    f"(Tensor(a!) y, Tensor ids, {_TABLES}, int vocabulary) -> ()",
    lowrank_plain.plain_lowrank_embedding_,
    dispatch.writes_in_place,
)
_lowrank_experts_ = dispatch.declare(
    "lowrank_experts_",
    f"(Tensor(a!) y, Tensor x, Tensor expert, int choices, int experts, {_TABLES}) -> ()",
    lowrank_plain.plain_lowrank_experts_,
    dispatch.writes_in_place,
)
dispatch.triton_version("lowrank_", "quickchange_kernels.lowrank.lowrank_triton:launch_lowrank")
dispatch.triton_version(
    "lowrank_embedding_", "quickchange_kernels.lowrank.lowrank_triton:launch_lowrank_embedding"
)

dispatch.triton_version(
    "lowrank_experts_", "quickchange_kernels.lowrank.lowrank_experts_triton:launch_lowrank_experts"
)


def operands(tables: LowRankTables, segments: Segments, group: int) -> tuple[Any, ...]:
    """Arguments of the operations after y and x, as the dispatcher takes them."""
    tiles, shape = segments.tiles, tables.shapes[group]
    return (
        tables.arena,
        tables.directory,
        tables.pages,
        tables.page_scale,
        tables.page_shift,
        tables.page_kind,
        segments.rows,
        segments.slot,
        segments.weight,
        None if tiles is None else tiles.pieces,
        None if tiles is None else tiles.tiles,
        0 if tiles is None else tiles.height,
        group,
        shape.most_pages,
        shape.aligned,
    )


def operands_experts(tables: LowRankTables, segments: Segments, groups: range) -> tuple[Any, ...]:
    """Operands of neighbouring groups, one for each expert."""
    *rest, _, aligned = operands(tables, segments, groups.start)
    most_pages = max([tables.shapes[group].most_pages for group in groups])
    return (*rest, most_pages, aligned)


def lowrank_(y: Tensor, x: Tensor, tables: LowRankTables, segments: Segments, group: int) -> None:
    """Add the updates of module group `group` to y [T, N], given its input x [T, K]."""
    if segments.slot.shape[0] == 0:
        return
    native.ensure()
    _lowrank_(y, x, *operands(tables, segments, group))


def lowrank_embedding_(
    y: Tensor,
    ids: Tensor,
    tables: LowRankTables,
    segments: Segments,
    group: int,
    vocabulary: int,
) -> None:
    """Add the updates of an embedding of `vocabulary` tokens to y [T, H], given the tokens."""
    if segments.slot.shape[0] == 0:
        return
    native.ensure()
    _lowrank_embedding_(y, ids, *operands(tables, segments, group), vocabulary)


def lowrank_experts_(
    y: Tensor,
    x: Tensor,
    expert: Tensor,
    choices: int,
    tables: LowRankTables,
    segments: Segments,
    groups: range,
) -> None:
    """Add the updates of experts, whose module groups are `groups`, to y [T · choices, N]."""
    if segments.slot.shape[0] == 0:
        return
    native.ensure()
    given = operands_experts(tables, segments, groups)
    _lowrank_experts_(y, x, expert, choices, len(groups), *given)
