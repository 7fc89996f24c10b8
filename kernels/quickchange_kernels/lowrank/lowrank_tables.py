"""Tables that lowrank_ reads: the adapters' pages, and which rows take which adapter.

Knows the layout only; lowrank_contract.py says what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

RANKS_PER_PAGE = 8
A_ALIGNMENT = 64  # bytes

# Rows of a tile: few, so that little is idle where every request has one row; or many, so that a
# page is read once for all of them.
SMALL_TILE, LARGE_TILE = 16, 64


_MAX_PARTS, _MIN_PART = 8, 1024  # parts in which features are summed; features


class PageKind(IntEnum):
    """Operation of a page on its rows."""

    IDENTITY = 0
    # an activation between A and B
    RELU = 1
    GELU = 2  # exact, with erf
    GELU_TANH = 3
    SILU = 4
    TANH = 5
    # no A; B is one row [width], by which the output as it was is multiplied and added
    GAIN = 6


@dataclass(frozen=True)
class GroupShape:
    """Sizes that decide a GPU's grid for one module group: on the host, stable over steps."""

    most_pages: int  # no adapter has more pages in the group; a power of two keeps graphs valid
    aligned: bool  # input features, columns, widths are multiples of 8, B offsets of 16 bytes


@dataclass(frozen=True)
class LowRankTables:
    """Weights of all resident adapters, and where they lie. Changes when adapters come and go.

    Offsets are in elements of `arena`; the offset of an A page is a multiple of 64 bytes.
    """

    arena: Tensor  # [E] the model's dtype
    directory: Tensor  # int32 [slots, groups, 2] page range (begin, end); begin == end: no update
    pages: Tensor  # int64 [P, 4] (a_offset, b_offset, column, width); A [8, in], B [8, width]
    page_scale: Tensor  # float32 [P] alpha / r
    page_shift: Tensor  # float32 [P, 8] added to A x: a bias is a rank of A row 0 and shift 1
    page_kind: Tensor  # int32 [P] PageKind
    shapes: tuple[GroupShape, ...]  # [groups]
    # int32 [slots]: columns of the logits that are tokens under each slot; None: all are. No kernel
    # reads it
    tokens: Tensor | None = None


@dataclass(frozen=True)
class RowTiles:
    """The segments once more, cut so that one GPU program owns each row.

    A tile is up to `height` rows under the same segments; no row is in two tiles. A piece is one
    segment's part of one tile. Tiles and pieces without rows are padding.
    """

    pieces: Tensor  # int32 [U, 4] (row begin, row end, slot, segment)
    tiles: Tensor  # int32 [R, 4] (row begin, row end, first piece, end of its pieces)
    height: int  # SMALL_TILE or LARGE_TILE


@dataclass(frozen=True)
class Segments:
    """Token rows, with the adapter and weight that they take. Made once a step, for all layers.

    A segment with no rows is padding.
    """

    rows: Tensor  # int32 [S, 2] token rows [begin, end)
    slot: Tensor  # int32 [S]
    weight: Tensor  # float32 [S]
    tiles: RowTiles | None = None  # for the Triton version; the others do without


Quad = tuple[int, int, int, int]


def rounded_to_power(pages: int) -> int:
    """The power of two, 1 at least, that has room for `pages`: for GroupShape.most_pages."""
    return 1 << max(pages - 1, 0).bit_length()


def parts_of(features: int) -> int:
    """Number of parts in which a GPU sums the features, to keep it busy with few rows."""
    return min(_MAX_PARTS, -(-features // _MIN_PART))


def columns_of(height: int) -> int:
    """Columns of y that one program of a GPU's expand owns: many where its tile has many rows."""
    return 128 if height == SMALL_TILE else 256


def tile_height(longest: int) -> int:
    """The tile height for a batch whose longest run of rows under the same segments is this."""
    return SMALL_TILE if longest <= SMALL_TILE else LARGE_TILE


def cut_tiles(
    spans: Iterable[tuple[int, int, Sequence[int]]], slots: Sequence[int], height: int
) -> tuple[list[Quad], list[Quad]]:
    """(pieces, tiles) of spans (row begin, row end, segments over exactly these rows).

    slots: each segment's slot.
    """
    pieces: list[Quad] = []
    tiles: list[Quad] = []
    for begin, end, members in spans:
        for row in range(begin, end, height):
            stop = min(row + height, end)
            first = len(pieces)
            pieces += [(row, stop, slots[segment], segment) for segment in members]
            tiles.append((row, stop, first, len(pieces)))
    return pieces, tiles
