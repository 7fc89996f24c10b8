"""lowrank_ and lowrank_embedding_ as two Triton kernels. See lowrank.py for the contract.

    shrink   h = A x of a piece's rows, some pages and a part of the features: one program each.
             Partial sums go to a float32 buffer.
    expand   a tile's rows over a block of columns: one program owns them, adds the partial sums in
             order, goes through all pieces and pages and writes y once. No atomics.

The two launches also keep every read of x before any write of y. An embedding needs no shrink: its
A x is a lookup, done in expand.

Which features are summed apart (`parts`) depends on their number alone; a tile's height, on how
many rows share a segment, changes no order of sums. The grid covers the most pages that any
resident adapter has; programs past an adapter's own pages end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.lowrank_tables import RANKS_PER_PAGE, SMALL_TILE, PageKind

MAX_PARTS = 8
MIN_PART = 1024  # features

# Arguments whose values, differing by layer or step, are worth no kernel of their own.
_STEP_SIZES = ["group", "groups", "pieces"]
_RANKS = tl.constexpr(RANKS_PER_PAGE)
_IDENTITY = tl.constexpr(int(PageKind.IDENTITY))
_RELU = tl.constexpr(int(PageKind.RELU))
_GELU = tl.constexpr(int(PageKind.GELU))
_GELU_TANH = tl.constexpr(int(PageKind.GELU_TANH))
_SILU = tl.constexpr(int(PageKind.SILU))
_TANH = tl.constexpr(int(PageKind.TANH))
_GAIN = tl.constexpr(int(PageKind.GAIN))


@triton.jit
def _page_range(directory_ptr, slot, group, groups):
    entry = directory_ptr + (slot * groups + group) * 2
    return tl.load(entry), tl.load(entry + 1)


@triton.jit
def _aligned(value, ALIGNED: tl.constexpr):
    """`value`, which the compiler may take for a multiple of 8 where ALIGNED is true."""
    return tl.multiple_of(value, 8) if ALIGNED else value


@triton.jit(do_not_specialize=_STEP_SIZES)
def shrink_kernel(
    # pointers
    x_ptr,
    arena_ptr,
    directory_ptr,
    pages_ptr,
    kind_ptr,
    pieces_ptr,
    partial_ptr,  # float32 [parts, pieces, HEIGHT, RANKS]
    # sizes
    K,
    group,
    groups,
    pieces,
    # strides
    x_row,
    # meta
    HEIGHT: tl.constexpr,
    PAGES: tl.constexpr,  # of one program
    RANKS: tl.constexpr,  # of a row of the buffer
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,  # features, a multiple of BLOCK_K
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    ALIGNED: tl.constexpr,
):
    piece = tl.program_id(0)
    begin = tl.load(pieces_ptr + piece * 4)
    end = tl.load(pieces_ptr + piece * 4 + 1)
    if begin >= end:
        return
    slot = tl.load(pieces_ptr + piece * 4 + 2)
    first, last = _page_range(directory_ptr, slot, group, groups)
    first_rank = tl.program_id(1) * (PAGES * _RANKS)
    if first + first_rank // _RANKS >= last:
        return
    part = tl.program_id(2)

    rank = tl.arange(0, PAGES * _RANKS)
    page = first + (first_rank + rank) // _RANKS
    live = page < last
    live = live & (tl.load(kind_ptr + page, mask=live, other=_GAIN) != _GAIN)
    a = _aligned(tl.load(pages_ptr + page.to(tl.int64) * 4, mask=live, other=0), ALIGNED)
    a_rows = arena_ptr + (a + (rank % _RANKS) * K)
    m = tl.arange(0, HEIGHT)
    in_tile = begin + m < end
    x_rows = x_ptr + (begin + m).to(tl.int64) * x_row

    h = tl.zeros((HEIGHT, PAGES * _RANKS), tl.float32)
    for k0 in range(part * PART, tl.minimum((part + 1) * PART, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_k = tl.full((BLOCK_K,), True, tl.int1) if EVEN_K else k < K
        weight = tl.load(  # stream
            a_rows[:, None] + k[None, :], mask=live[:, None] & in_k[None, :], other=0.0
        )
        x = tl.load(x_rows[:, None] + k[None, :], mask=in_tile[:, None] & in_k[None, :], other=0.0)
        h = tl.dot(x, tl.trans(weight.to(x.dtype)), h, input_precision="ieee")

    row = (part.to(tl.int64) * pieces + piece) * HEIGHT + m
    out = partial_ptr + row[:, None] * RANKS + (first_rank + rank)[None, :]
    tl.store(out, h, mask=in_tile[:, None] & live[None, :])


@triton.jit
def _activated(h, kind):
    """h [M, R] through the activation of each rank's page, kind [1, R]."""
    h = tl.where(kind == _RELU, tl.maximum(h, 0.0), h)
    gelu = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    gelu_tanh = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    silu = h * tl.sigmoid(h)
    tanh = 2 * tl.sigmoid(2 * h) - 1
    h = tl.where(kind == _GELU, gelu, h)
    h = tl.where(kind == _GELU_TANH, gelu_tanh, h)
    h = tl.where(kind == _SILU, silu, h)
    return tl.where(kind == _TANH, tanh, h)


@triton.jit
def _summed(partial_ptr, row, rank, mask, part_stride, RANKS: tl.constexpr, PARTS: tl.constexpr):
    """The partial sums of a piece's rows [M] and some ranks [R], added in order: [M, R]."""
    source = partial_ptr + row[:, None] * RANKS + rank[None, :]
    h = tl.load(source, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        h += tl.load(source + part * part_stride, mask=mask, other=0.0)
    return h


@triton.jit(do_not_specialize=_STEP_SIZES)
def expand_kernel(
    # pointers
    y_ptr,
    partial_ptr,  # float32 [PARTS, pieces, HEIGHT, RANKS], or None
    ids_ptr,  # None, or int64 [T]
    arena_ptr,
    directory_ptr,
    pages_ptr,
    scale_ptr,
    shift_ptr,
    kind_ptr,
    weight_ptr,
    pieces_ptr,
    tiles_ptr,
    # sizes
    N,
    vocabulary,
    group,
    groups,
    pieces,
    # strides
    y_row,
    # meta
    HEIGHT: tl.constexpr,
    PAGES: tl.constexpr,  # at a time
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tile = tl.program_id(0)
    begin = tl.load(tiles_ptr + tile * 4)
    end = tl.load(tiles_ptr + tile * 4 + 1)
    if begin >= end:
        return
    n0 = tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.arange(0, HEIGHT)
    in_tile = begin + m < end
    rank = tl.arange(0, PAGES * _RANKS)
    part_stride = pieces.to(tl.int64) * HEIGHT * RANKS

    update = tl.zeros((HEIGHT, BLOCK_N), tl.float32)
    gain = tl.zeros((BLOCK_N,), tl.float32)
    chunks = 0
    first_piece = tl.load(tiles_ptr + tile * 4 + 2)
    last_piece = tl.load(tiles_ptr + tile * 4 + 3)
    for piece in range(first_piece, last_piece):
        slot = tl.load(pieces_ptr + piece * 4 + 2)
        weight = tl.load(weight_ptr + tl.load(pieces_ptr + piece * 4 + 3))
        first, last = _page_range(directory_ptr, slot, group, groups)
        for page0 in range(first, last, PAGES):
            page = page0 + rank // _RANKS
            live = page < last
            entry = pages_ptr + page.to(tl.int64) * 4
            column = _aligned(tl.load(entry + 2, mask=live, other=0).to(tl.int32), ALIGNED)
            width = _aligned(tl.load(entry + 3, mask=live, other=0).to(tl.int32), ALIGNED)
            hit = live & (column < n0 + BLOCK_N) & (column + width > n0)
            if tl.max(hit.to(tl.int32), axis=0) > 0:
                chunks += 1
                kind = tl.load(kind_ptr + page, mask=hit, other=_IDENTITY)
                is_gain = kind == _GAIN
                low_rank = hit & (kind != _GAIN)
                scale = weight * tl.load(scale_ptr + page, mask=hit, other=0.0)

                lanes = in_tile[:, None] & low_rank[None, :]
                if ids_ptr is None:
                    row = piece * HEIGHT + m.to(tl.int64)
                    at = (page0 - first) * _RANKS + rank
                    h = _summed(partial_ptr, row, at, lanes, part_stride, RANKS, PARTS)
                else:
                    ids = tl.load(ids_ptr + begin + m, mask=in_tile, other=0)
                    a_row = tl.load(entry, mask=low_rank, other=0) + (rank % _RANKS) * vocabulary
                    h = tl.load(
                        arena_ptr + (ids[:, None] + a_row[None, :]), mask=lanes, other=0.0
                    ).to(tl.float32)
                shift = tl.load(shift_ptr + page * _RANKS + rank % _RANKS, mask=low_rank, other=0.0)
                h += shift[None, :]
                if tl.max(tl.where(low_rank, kind, 0), axis=0) > 0:
                    h = _activated(h, kind[None, :])
                h = tl.where(low_rank[None, :], h * scale[None, :], 0.0)

                b_row = _aligned(tl.load(entry + 1, mask=hit, other=0), ALIGNED)
                b_row += (rank % _RANKS) * width - column
                inside = (n[None, :] >= column[:, None]) & (n[None, :] < (column + width)[:, None])
                read = hit & (low_rank | (rank % _RANKS == 0))  # a gain has one row
                b = tl.load(  # stream
                    arena_ptr + (b_row[:, None] + n[None, :]),
                    mask=read[:, None] & inside,
                    other=0.0,
                )
                if tl.max(is_gain.to(tl.int32), axis=0) > 0:
                    gains = tl.where(is_gain[:, None], b.to(tl.float32) * scale[:, None], 0.0)
                    gain += tl.sum(gains, axis=0)
                factor = h.to(y_ptr.dtype.element_ty)
                update = tl.dot(factor, b.to(factor.dtype), update, input_precision="ieee")

    if chunks > 0:
        out = y_ptr + (begin + m).to(tl.int64)[:, None] * y_row + n[None, :]
        mask = in_tile[:, None] & (n < N)[None, :]
        y = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        y += update + y * gain[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Blocks:
    """Block sizes and launch options of one kernel."""

    pages: int
    columns: int  # features of shrink, output columns of expand
    num_warps: int
    num_stages: int


def parts(features: int) -> int:
    """In how many parts the features are summed apart, to keep a GPU busy with few rows."""
    return min(MAX_PARTS, -(-features // MIN_PART))


def part_size(features: int, block: int) -> int:
    """Features of a part: a multiple of `block`."""
    return -(-features // (parts(features) * block)) * block


def shrink_blocks(height: int, most_pages: int, itemsize: int, hip: bool) -> Blocks:
    """Of shrink, for rows of `itemsize` bytes an element."""
    stages = 2 if hip else 3
    if height == SMALL_TILE:
        return Blocks(2, 512 // itemsize, 4, stages)
    return Blocks(min(8, max(2, most_pages)), 128 // itemsize, 4, stages)


def expand_blocks(height: int, most_pages: int) -> Blocks:
    """Of expand."""
    return Blocks(min(8, max(2, most_pages)), 128, 4 if height == SMALL_TILE else 8, 1)


class _Operands(NamedTuple):
    """What follows y and x in the operations' schemas."""

    arena: Tensor
    directory: Tensor
    pages: Tensor
    page_scale: Tensor
    page_shift: Tensor
    page_kind: Tensor
    rows: Tensor
    slot: Tensor
    weight: Tensor
    pieces: Tensor | None
    tiles: Tensor | None
    tile_height: int
    group: int
    most_pages: int
    aligned: bool


def launch_lowrank(y: Tensor, x: Tensor, *operands: Any) -> None:
    """lowrank_ with the arguments that its schema names."""
    o = _Operands(*operands)
    pieces, _ = _tiles(o)
    _check_rows(y, "y")
    _check_rows(x, "x")
    if x.dtype != y.dtype:
        raise TypeError(f"lowrank: x is {x.dtype}, y is {y.dtype}; they must be the same")
    K = x.shape[1]
    blocks = shrink_blocks(o.tile_height, o.most_pages, x.itemsize, torch.version.hip is not None)
    groups_of_pages = triton.cdiv(o.most_pages, blocks.pages)
    row = max(blocks.pages, expand_blocks(o.tile_height, o.most_pages).pages, o.most_pages)
    shape = (parts(K), len(pieces), o.tile_height, row * RANKS_PER_PAGE)
    partial = torch.empty(shape, dtype=torch.float32, device=y.device)
    shrink_kernel[(len(pieces), groups_of_pages, parts(K))](
        x,
        o.arena,
        o.directory,
        o.pages,
        o.page_kind,
        pieces,
        partial,
        K,
        o.group,
        o.directory.shape[1],
        len(pieces),
        x.stride(0),
        HEIGHT=o.tile_height,
        PAGES=blocks.pages,
        RANKS=shape[3],
        BLOCK_K=blocks.columns,
        PART=part_size(K, blocks.columns),
        EVEN_K=K % blocks.columns == 0,
        ALIGNED=o.aligned,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    _expand(y, partial, None, o, 0)


def launch_lowrank_embedding(y: Tensor, ids: Tensor, *operands: Any) -> None:
    """lowrank_embedding_ with the arguments that its schema names."""
    *rest, vocabulary = operands
    _check_rows(y, "y")
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        raise TypeError(f"lowrank: ids must be contiguous int64, got {ids.dtype}")
    _expand(y, None, ids, _Operands(*rest), vocabulary)


def _expand(
    y: Tensor, partial: Tensor | None, ids: Tensor | None, o: _Operands, vocabulary: int
) -> None:
    pieces, tiles = _tiles(o)
    blocks = expand_blocks(o.tile_height, o.most_pages)
    expand_kernel[(len(tiles), triton.cdiv(y.shape[1], blocks.columns))](
        y,
        partial,
        ids,
        o.arena,
        o.directory,
        o.pages,
        o.page_scale,
        o.page_shift,
        o.page_kind,
        o.weight,
        pieces,
        tiles,
        y.shape[1],
        vocabulary,
        o.group,
        o.directory.shape[1],
        len(pieces),
        y.stride(0),
        HEIGHT=o.tile_height,
        PAGES=blocks.pages,
        RANKS=1 if partial is None else partial.shape[3],
        PARTS=1 if partial is None else partial.shape[0],
        BLOCK_N=blocks.columns,
        ALIGNED=o.aligned,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _tiles(o: _Operands) -> tuple[Tensor, Tensor]:
    if o.pieces is None or o.tiles is None:
        raise ValueError("lowrank: the segments have no tiles, which the GPU's version needs")
    return o.pieces, o.tiles


def _check_rows(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        raise ValueError(
            f"lowrank: {name} must have two dimensions and contiguous rows, got "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        )
