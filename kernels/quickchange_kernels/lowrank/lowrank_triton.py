"""lowrank_ and lowrank_embedding_ as two Triton kernels. See lowrank_contract.py for the contract.

    shrink   h = A x of a piece's rows, some pages and a part of the features: one program each.
             Partial sums go to a float32 buffer.
    expand   a tile's rows over a block of columns: one program owns them, adds the partial sums in
             order, goes through all pieces and pages and writes y once. No atomics.

The two launches also keep every read of x before any write of y. An embedding needs no shrink: its
A x is a lookup, done in expand.

Which features are summed apart (`parts_of`) depends on their number alone; a tile's height, on how
many rows share a segment, changes no order of sums. Programs are as many as the most pages that any
resident adapter has, but no more than keep a GPU busy: they go through an adapter's own pages in
turn, and those past them end at once.

On Hopper and later, expand starts while shrink runs (programmatic dependent launch), reads its
tables and weights, and waits for shrink before it reads the sums or touches y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quickchange_kernels.compilation import TARGETS, Compilation
from quickchange_kernels.launch_config import (
    DEPENDENT_TARGETS,
    OTHER_TARGETS,
    aligned,
    dependent_launch,
    fixed_kernel,
    pointer,
    wide_row,
    wide_size,
)
from quickchange_kernels.lowrank.lowrank_tables import (
    LARGE_TILE,
    RANKS_PER_PAGE,
    SMALL_TILE,
    PageKind,
    parts_of,
)
from quickchange_kernels.lowrank.lowrank_tuning import (
    chunk_programs,
    expand_config,
    shrink_config,
)

_RANKS = tl.constexpr(RANKS_PER_PAGE)
_IDENTITY = tl.constexpr(int(PageKind.IDENTITY))
_RELU = tl.constexpr(int(PageKind.RELU))
_GELU = tl.constexpr(int(PageKind.GELU))
_GELU_TANH = tl.constexpr(int(PageKind.GELU_TANH))
_SILU = tl.constexpr(int(PageKind.SILU))
_TANH = tl.constexpr(int(PageKind.TANH))
_GAIN = tl.constexpr(int(PageKind.GAIN))


@triton.jit
def page_range(directory_ptr, slot, group, groups):
    """The pages (begin, end) of a slot in a group."""
    entry = directory_ptr + (slot * groups + group) * 2
    return tl.load(entry), tl.load(entry + 1)


@fixed_kernel
def shrink_kernel(
    # pointers
    x_ptr,
    arena_ptr,
    directory_ptr,
    pages_ptr,
    kind_ptr,
    pieces_ptr,
    partial_ptr,  # float32 [parts, pieces, HEIGHT, ranks]
    # sizes
    group,
    groups,
    pieces,
    # strides
    x_row,
    ranks,  # row length of the buffer, a multiple of 16
    # meta
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    PAGES: tl.constexpr,  # pages of one chunk
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,  # features of one part, a multiple of BLOCK_K
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (piece, chunks of pages, part of the features): partial sums of A x."""
    if DEPENDENT:
        gdc_launch_dependents()
    piece = tl.program_id(0)
    begin = tl.load(pieces_ptr + piece * 4)
    end = tl.load(pieces_ptr + piece * 4 + 1)
    if begin >= end:
        return
    slot = tl.load(pieces_ptr + piece * 4 + 2)
    first, last = page_range(directory_ptr, slot, group, groups)
    part = tl.program_id(2)

    rank = tl.arange(0, PAGES * _RANKS)
    m = tl.arange(0, HEIGHT)
    in_tile = begin + m < end
    x_rows = wide_row(x_ptr, (begin + m).to(tl.int64) * x_row, ALIGNED)
    stop = tl.minimum((part + 1) * PART, K)
    row = (part.to(tl.int64) * pieces + piece) * HEIGHT + m
    out_rows = wide_row(partial_ptr, row * ranks, True)

    for page0 in range(first + tl.program_id(1) * PAGES, last, tl.num_programs(1) * PAGES):
        page = page0 + rank // _RANKS
        live = page < last
        live = live & (tl.load(kind_ptr + page, mask=live, other=_GAIN) != _GAIN)
        a = tl.load(pages_ptr + page.to(tl.int64) * 4, mask=live, other=0)
        a_rows = wide_row(arena_ptr, a + (rank % _RANKS) * K, ALIGNED)

        h = tl.zeros((HEIGHT, PAGES * _RANKS), tl.float32)
        for k0 in range(part * PART, stop, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_k = tl.full((BLOCK_K,), True, tl.int1) if K % BLOCK_K == 0 else k < K
            weight = tl.load(  # stream
                a_rows[:, None] + k[None, :], mask=live[:, None] & in_k[None, :], other=0.0
            )
            x = tl.load(
                x_rows[:, None] + k[None, :], mask=in_tile[:, None] & in_k[None, :], other=0.0
            )
            h = tl.dot(x, tl.trans(weight.to(x.dtype)), h, input_precision="ieee")

        at = (page0 - first) * _RANKS + rank
        tl.store(out_rows[:, None] + at[None, :], h, mask=in_tile[:, None] & live[None, :])


@triton.jit
def activated(h, kind):
    """h [..., R] through the activation of each rank's page, kind [R] or [1, R]."""
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
def _summed(partial_ptr, row, rank, mask, ranks, part_stride, PARTS: tl.constexpr):
    """The partial sums of a piece's rows [M] and some ranks [R], added in order: [M, R]."""
    source = wide_row(partial_ptr, row * ranks, True)[:, None] + rank[None, :]
    h = tl.load(source, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        h += tl.load(source + part * part_stride, mask=mask, other=0.0)
    return h


@fixed_kernel
def expand_kernel(
    # pointers
    y_ptr,
    partial_ptr,  # float32 [PARTS, pieces, HEIGHT, ranks], or None
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
    K,  # an embedding's vocabulary
    group,
    groups,
    pieces,
    # strides
    y_row,
    ranks,
    # meta
    HEIGHT: tl.constexpr,
    PAGES: tl.constexpr,  # pages of one step
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (tile, block of columns): adds the updates of all pieces and pages to y."""
    tile = tl.program_id(0)
    begin = tl.load(tiles_ptr + tile * 4)
    end = tl.load(tiles_ptr + tile * 4 + 1)
    if begin >= end:
        if DEPENDENT:
            gdc_wait()
        return
    n0 = tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.arange(0, HEIGHT)
    in_tile = begin + m < end
    rank = tl.arange(0, PAGES * _RANKS)
    part_stride = pieces.to(tl.int64) * HEIGHT * ranks

    update = tl.zeros((HEIGHT, BLOCK_N), tl.float32)
    gain = tl.zeros((BLOCK_N,), tl.float32)
    chunks = 0
    first_piece = tl.load(tiles_ptr + tile * 4 + 2)
    last_piece = tl.load(tiles_ptr + tile * 4 + 3)
    for piece in range(first_piece, last_piece):
        slot = tl.load(pieces_ptr + piece * 4 + 2)
        weight = tl.load(weight_ptr + tl.load(pieces_ptr + piece * 4 + 3))
        first, last = page_range(directory_ptr, slot, group, groups)
        for page0 in range(first, last, PAGES):
            page = page0 + rank // _RANKS
            live = page < last
            entry = pages_ptr + page.to(tl.int64) * 4
            column = tl.load(entry + 2, mask=live, other=0).to(tl.int32)
            width = tl.load(entry + 3, mask=live, other=0).to(tl.int32)
            if ALIGNED:
                column = tl.multiple_of(column, 8)
                width = tl.multiple_of(width, 8)
            hit = live & (column < n0 + BLOCK_N) & (column + width > n0)
            if tl.max(hit.to(tl.int32), axis=0) > 0:
                chunks += 1
                kind = tl.load(kind_ptr + page, mask=hit, other=_IDENTITY)
                is_gain = kind == _GAIN
                low_rank = hit & (kind != _GAIN)
                scale = weight * tl.load(scale_ptr + page, mask=hit, other=0.0)

                b_row = tl.load(entry + 1, mask=hit, other=0)
                b_row += (rank % _RANKS) * width - column
                inside = (n[None, :] >= column[:, None]) & (n[None, :] < (column + width)[:, None])
                read = hit & (low_rank | (rank % _RANKS == 0))  # a gain has one row
                b_rows = wide_row(arena_ptr, b_row, ALIGNED)
                b = tl.load(  # stream
                    b_rows[:, None] + n[None, :], mask=read[:, None] & inside, other=0.0
                )

                if DEPENDENT:
                    gdc_wait()
                lanes = in_tile[:, None] & low_rank[None, :]
                if ids_ptr is None:
                    row = piece * HEIGHT + m.to(tl.int64)
                    at = (page0 - first) * _RANKS + rank
                    h = _summed(partial_ptr, row, at, lanes, ranks, part_stride, PARTS)
                else:
                    ids = tl.load(ids_ptr + begin + m, mask=in_tile, other=0)
                    a_row = tl.load(entry, mask=low_rank, other=0) + (rank % _RANKS) * K
                    h = tl.load(
                        arena_ptr + (ids[:, None] + a_row[None, :]), mask=lanes, other=0.0
                    ).to(tl.float32)
                shift = tl.load(shift_ptr + page * _RANKS + rank % _RANKS, mask=low_rank, other=0.0)
                h += shift[None, :]
                if tl.max(tl.where(low_rank, kind, 0), axis=0) > 0:
                    h = activated(h, kind[None, :])
                h = tl.where(low_rank[None, :], h * scale[None, :], 0.0)

                if tl.max(is_gain.to(tl.int32), axis=0) > 0:
                    gains = tl.where(is_gain[:, None], b.to(tl.float32) * scale[:, None], 0.0)
                    gain += tl.sum(gains, axis=0)
                factor = h.to(y_ptr.dtype.element_ty)
                update = tl.dot(factor, b.to(factor.dtype), update, input_precision="ieee")

    if DEPENDENT:
        gdc_wait()  # also where no page hits: the kernel that follows may rely on shrink's end
    if chunks > 0:
        out = wide_row(y_ptr, (begin + m).to(tl.int64) * y_row, ALIGNED)[:, None] + n[None, :]
        mask = in_tile[:, None] & (n < wide_size(N, y_ptr, ALIGNED))[None, :]
        y = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        y += update + y * gain[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


class Operands(NamedTuple):
    """Arguments after y and x in the operations' schemas."""

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
    """lowrank_; operands as its schema names them. Raises TypeError or ValueError for others."""
    o = Operands(*operands)
    pieces, _ = tiles_of(o)
    check_rows(y, "y")
    check_rows(x, "x")
    if x.dtype != y.dtype:
        raise TypeError(f"lowrank: x is {x.dtype}, y is {y.dtype}; they must be the same")
    K = x.shape[1]
    wide = o.aligned and aligned(x, o.arena)
    dependent = dependent_launch()
    config = shrink_config(K, x.dtype, o.tile_height, aligned=wide, dependent=dependent)
    ranks = RANKS_PER_PAGE * max(2, o.most_pages)
    shape = (parts_of(K), len(pieces), o.tile_height, ranks)
    partial = torch.empty(shape, dtype=torch.float32, device=y.device)
    chunks = chunk_programs(o.most_pages, config.constants["PAGES"], len(pieces) * parts_of(K))
    shrink_kernel[(len(pieces), chunks, parts_of(K))](
        x,
        o.arena,
        o.directory,
        o.pages,
        o.page_kind,
        pieces,
        partial,
        o.group,
        o.directory.shape[1],
        len(pieces),
        x.stride(0),
        ranks,
        **config.keywords,
    )
    _expand(y, partial, None, o, K)


def launch_lowrank_embedding(y: Tensor, ids: Tensor, *operands: Any) -> None:
    """lowrank_embedding_; operands as its schema names them. Raises as launch_lowrank."""
    *rest, vocabulary = operands
    check_rows(y, "y")
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        raise TypeError(f"lowrank: ids must be contiguous int64, got {ids.dtype}")
    _expand(y, None, ids, Operands(*rest), vocabulary)


def _expand(
    y: Tensor, partial: Tensor | None, ids: Tensor | None, o: Operands, features: int
) -> None:
    """Launch expand. features: those of the module's input, or an embedding's vocabulary."""
    pieces, tiles = tiles_of(o)
    summed = features if ids is None else None
    wide = o.aligned and aligned(y, o.arena)
    dependent = ids is None and dependent_launch()
    config = expand_config(summed, o.tile_height, aligned=wide, dependent=dependent)
    expand_kernel[(len(tiles), triton.cdiv(y.shape[1], config.constants["BLOCK_N"]))](
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
        features,
        o.group,
        o.directory.shape[1],
        len(pieces),
        y.stride(0),
        0 if partial is None else partial.shape[3],
        **config.keywords,
    )


def tiles_of(o: Operands) -> tuple[Tensor, Tensor]:
    """The segments' pieces and tiles. Raises ValueError where there are none."""
    if o.pieces is None or o.tiles is None:
        raise ValueError("lowrank: the segments have no tiles, which the GPU's version needs")
    return o.pieces, o.tiles


def check_rows(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless the tensor is rows whose elements are contiguous."""
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        raise ValueError(
            f"lowrank: {name} must have two dimensions and contiguous rows, got "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        )


_TABLES = {
    "directory_ptr": "*i32", "pages_ptr": "*i64", "kind_ptr": "*i32", "pieces_ptr": "*i32",
    "partial_ptr": "*fp32", "group": "i32", "groups": "i32", "pieces": "i32", "ranks": "i32",
}  # fmt: skip


def compilations_for(
    features: int,
    dtype: torch.dtype,
    *,
    wide: bool,
    dependent: bool,
    embedding: bool = False,
    targets: tuple[str, ...] = TARGETS,
) -> Iterator[Compilation]:
    """All that lowrank_, or for an embedding lowrank_embedding_, launches for a module group.

    features: those of the group's input; an embedding's are not looked at. wide: GroupShape.aligned
    and `aligned` of rows of x and y. dependent: `dependent_launch()`.
    """
    row = pointer(dtype)
    narrow = dtype.itemsize == 2
    shape = "embedding" if embedding else f"{features} features"
    shape += ("" if wide else ", odd") + (", dependent" if dependent and not embedding else "")
    for height, phase in ((SMALL_TILE, "decode"), (LARGE_TILE, "prefill")):
        name = f"{shape}, {phase}, {row[1:]}"
        if not embedding:
            shrink = shrink_config(features, dtype, height, aligned=wide, dependent=dependent)
            reads = {
                "x_ptr": row,
                "arena_ptr": row,
                "x_row": "i32",
            } | _TABLES
            yield shrink.compilation(
                f"lowrank shrink, {name}", shrink_kernel, reads, products=narrow, targets=targets
            )
        expand = expand_config(
            None if embedding else features,
            height,
            aligned=wide,
            dependent=dependent and not embedding,
        )
        absent = "partial_ptr" if embedding else "ids_ptr"
        types: dict[str, str | None] = {
            **_TABLES,
            "y_ptr": row, "arena_ptr": row, "scale_ptr": "*fp32", "shift_ptr": "*fp32",
            "weight_ptr": "*fp32", "tiles_ptr": "*i32", "ids_ptr": "*i64", "N": "i32", "K": "i32",
            "y_row": "i32", absent: None,
        }  # fmt: skip
        yield expand.compilation(
            f"lowrank expand, {name}", expand_kernel, types, products=narrow, targets=targets
        )


def compilations() -> Iterator[Compilation]:
    """Configurations for inputs of Llama 8B (4096 features) and of 70B's down (28672)."""
    for dependent, targets in ((False, OTHER_TARGETS), (True, DEPENDENT_TARGETS)):
        how: dict[str, Any] = {"wide": True, "dependent": dependent, "targets": targets}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from compilations_for(4096, dtype, **how)
        yield from compilations_for(28672, torch.bfloat16, **how)
    yield from compilations_for(0, torch.bfloat16, wide=True, dependent=False, embedding=True)
