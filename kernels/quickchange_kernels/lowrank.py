"""lowrank_: add every row's low-rank updates to a linear's or an embedding's output, in one call.

    y[rows_s, column : column + width] += weight_s · scale_p · (x[rows_s] A_pᵀ + shift_p) B_p

for each segment s and each page p of (slot_s, group). A page is 8 ranks of one update; an update of
rank r is ⌈r/8⌉ pages, the last one zero-padded, so ranks mix freely and nothing is padded further.

Contract
    y    [T, N]  rows contiguous (any row stride); written in place; may not overlap x
    x    [T, K]  lowrank_: y's dtype, rows contiguous (any row stride)
    ids  int64 [T]  lowrank_embedding_: the tokens; A x is column ids[t] of A [8, vocabulary]
Several segments may cover the same rows (compositions add up). A row in no segment is neither
written nor read, and costs nothing. No segments: the call returns at once. Sums are in float32.
The native version adds to a row in the order of segments, then pages, whatever the other rows are,
so that a row's result does not depend on the batch it is in, within the shapes it takes.
Rows, slots and pages are trusted to be in range: the tables' owner checks them when they change,
not each layer. Knows nothing of adapters' names.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quickchange_kernels import dispatch, lowrank_plain, native

RANKS_PER_PAGE = 8
A_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class LowRankTables:
    """All resident adapters' weights and where they lie. Changes when adapters come and go.

    Offsets are in elements of `arena`; the offset of an A page is a multiple of 64 bytes.
    """

    arena: Tensor  # [E] the model's dtype
    directory: Tensor  # int32 [slots, groups, 2] page range (begin, end); begin == end: no update
    pages: Tensor  # int64 [P, 4] (a_offset, b_offset, column, width); A [8, in], B [8, width]
    page_scale: Tensor  # float32 [P] alpha / r
    page_shift: Tensor  # float32 [P, 8] added to A x: a bias is a rank of A row 0 and shift 1


@dataclass(frozen=True)
class Segments:
    """Which token rows take which adapter, at which weight. Made once a step, for all layers."""

    rows: Tensor  # int32 [S, 2] token rows [begin, end)
    slot: Tensor  # int32 [S]
    weight: Tensor  # float32 [S]


def reference_lowrank(
    y: Tensor, x: Tensor, tables: LowRankTables, segments: Segments, group: int
) -> Tensor:
    """y after the operation, in float64: [T, N]."""
    out = y.double()
    for begin, end, weight, page in _updates(tables, segments, group):
        a, b = _page_weights(tables, page, x.shape[1])
        _add_update(out, x[begin:end].double() @ a.T, b, tables, (begin, end, weight, page))
    return out


def reference_lowrank_embedding(
    y: Tensor,
    ids: Tensor,
    tables: LowRankTables,
    segments: Segments,
    group: int,
    vocabulary: int,
) -> Tensor:
    """y after the operation, in float64: [T, H]."""
    out = y.double()
    for begin, end, weight, page in _updates(tables, segments, group):
        a, b = _page_weights(tables, page, vocabulary)
        _add_update(out, a[:, ids[begin:end]].T, b, tables, (begin, end, weight, page))
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


def _page_weights(tables: LowRankTables, page: int, features: int) -> tuple[Tensor, Tensor]:
    """A [8, features] and B [8, width] in float64."""
    a_offset, b_offset, _, width = tables.pages[page].tolist()
    a = tables.arena[a_offset : a_offset + RANKS_PER_PAGE * features]
    b = tables.arena[b_offset : b_offset + RANKS_PER_PAGE * width]
    return a.view(RANKS_PER_PAGE, features).double(), b.view(RANKS_PER_PAGE, width).double()


def _add_update(
    out: Tensor, ax: Tensor, b: Tensor, tables: LowRankTables, update: tuple[int, int, float, int]
) -> None:
    begin, end, weight, page = update
    _, _, column, width = tables.pages[page].tolist()
    scale = weight * tables.page_scale[page].double()
    shifted = ax + tables.page_shift[page].double()
    out[begin:end, column : column + width] += scale * (shifted @ b)


_TABLES = (
    "Tensor arena, Tensor directory, Tensor pages, Tensor page_scale, Tensor page_shift, "
    "Tensor rows, Tensor slot, Tensor weight, int group"
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


def lowrank_(y: Tensor, x: Tensor, tables: LowRankTables, segments: Segments, group: int) -> None:
    """Add the updates of module group `group` to y [T, N], given its input x [T, K]."""
    if segments.slot.shape[0] == 0:
        return
    native.ensure()
    _lowrank_(
        y,
        x,
        tables.arena,
        tables.directory,
        tables.pages,
        tables.page_scale,
        tables.page_shift,
        segments.rows,
        segments.slot,
        segments.weight,
        group,
    )


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
    _lowrank_embedding_(
        y,
        ids,
        tables.arena,
        tables.directory,
        tables.pages,
        tables.page_scale,
        tables.page_shift,
        segments.rows,
        segments.slot,
        segments.weight,
        group,
        vocabulary,
    )
