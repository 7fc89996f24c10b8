"""lowrank_experts_ as two Triton kernels. See lowrank_contract.py for the contract.

As lowrank_triton.py, with the difference that neighbouring rows take the pages of different
experts, so that no page is shared by a tile's rows and nothing is a matrix product:

    shrink   h = A x of one row and some pages, for one piece: one program each
    expand   one row over a block of columns: one program goes through its tile's pieces and their
             pages, and writes y once. No atomics

A row's sums have an order of their own that no other row changes. The grids have a program for
every row that a tile can hold; those past its end, and past an adapter's own pages, end at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.launch_config import aligned, fixed_kernel, pointer, wide_row, wide_size
from quickchange_kernels.lowrank.lowrank_tables import RANKS_PER_PAGE, PageKind
from quickchange_kernels.lowrank.lowrank_triton import (
    Operands,
    activated,
    check_rows,
    page_range,
    tiles_of,
)
from quickchange_kernels.lowrank.lowrank_tuning import (
    EXPERT_COLUMNS,
    EXPERT_PAGES,
    chunk_programs,
    experts_configs,
)

_RANKS = tl.constexpr(RANKS_PER_PAGE)
_IDENTITY = tl.constexpr(int(PageKind.IDENTITY))


@fixed_kernel
def shrink_experts_kernel(
    # pointers
    x_ptr,
    expert_ptr,  # int64 [rows of y]
    arena_ptr,
    directory_ptr,
    pages_ptr,
    pieces_ptr,
    h_ptr,  # float32 [pieces, HEIGHT * choices, ranks]
    # sizes
    K,
    group,
    groups,
    choices,
    # strides
    x_row,
    y_per_x,  # rows of y that read one row of x
    ranks,  # row length of the buffer
    # meta
    PAGES: tl.constexpr,  # pages of one chunk
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (piece, row of its tile, chunks of pages): A x."""
    piece = tl.program_id(0)
    within = tl.program_id(1)
    token = tl.load(pieces_ptr + piece * 4) + within // choices
    if token >= tl.load(pieces_ptr + piece * 4 + 1):
        return
    row = token.to(tl.int64) * choices + within % choices
    slot = tl.load(pieces_ptr + piece * 4 + 2)
    expert = tl.load(expert_ptr + row).to(tl.int32)
    first, last = page_range(directory_ptr, slot, group + expert, groups)
    rows = tl.num_programs(1)
    rank = tl.arange(0, PAGES * _RANKS)
    x_row_ptr = wide_row(x_ptr, row // y_per_x * x_row, ALIGNED)
    out = h_ptr + (piece * rows + within).to(tl.int64) * ranks
    K = wide_size(K, arena_ptr, ALIGNED)

    for page0 in range(first + tl.program_id(2) * PAGES, last, tl.num_programs(2) * PAGES):
        page = page0 + rank // _RANKS
        live = page < last
        a = tl.load(pages_ptr + page.to(tl.int64) * 4, mask=live, other=0)
        a_rows = wide_row(arena_ptr, a + (rank % _RANKS) * K, ALIGNED)
        h = tl.zeros((PAGES * _RANKS,), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            weight = tl.load(  # stream
                a_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0
            )
            x = tl.load(x_row_ptr + k, mask=k < K, other=0.0)
            h += tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        tl.store(out + (page0 - first) * _RANKS + rank, h, mask=live)


@fixed_kernel
def expand_experts_kernel(
    # pointers
    y_ptr,
    h_ptr,  # float32 [pieces, HEIGHT * choices, ranks]
    expert_ptr,
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
    group,
    groups,
    choices,
    # strides
    y_row,
    ranks,
    # meta
    PAGES: tl.constexpr,  # pages of one step
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (tile, its row, block of columns): adds the updates of all pieces and pages."""
    tile = tl.program_id(0)
    within = tl.program_id(1)
    token = tl.load(tiles_ptr + tile * 4) + within // choices
    if token >= tl.load(tiles_ptr + tile * 4 + 1):
        return
    row = token.to(tl.int64) * choices + within % choices
    expert = tl.load(expert_ptr + row).to(tl.int32)
    rows = tl.num_programs(1)
    n0 = tl.program_id(2) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, PAGES * _RANKS)

    update = tl.zeros((BLOCK_N,), tl.float32)
    chunks = 0
    first_piece = tl.load(tiles_ptr + tile * 4 + 2)
    last_piece = tl.load(tiles_ptr + tile * 4 + 3)
    for piece in range(first_piece, last_piece):
        slot = tl.load(pieces_ptr + piece * 4 + 2)
        weight = tl.load(weight_ptr + tl.load(pieces_ptr + piece * 4 + 3))
        first, last = page_range(directory_ptr, slot, group + expert, groups)
        for page0 in range(first, last, PAGES):
            chunks += 1
            page = page0 + rank // _RANKS
            live = page < last
            entry = pages_ptr + page.to(tl.int64) * 4
            column = tl.load(entry + 2, mask=live, other=0).to(tl.int32)
            width = tl.load(entry + 3, mask=live, other=0).to(tl.int32)
            kind = tl.load(kind_ptr + page, mask=live, other=_IDENTITY)
            scale = weight * tl.load(scale_ptr + page, mask=live, other=0.0)
            source = h_ptr + (piece * rows + within).to(tl.int64) * ranks
            h = tl.load(source + (page0 - first) * _RANKS + rank, mask=live, other=0.0)
            h += tl.load(shift_ptr + page * _RANKS + rank % _RANKS, mask=live, other=0.0)
            if tl.max(kind, axis=0) > 0:
                h = activated(h, kind)
            h = tl.where(live, h * scale, 0.0)

            b_row = tl.load(entry + 1, mask=live, other=0)
            if ALIGNED:
                column = tl.multiple_of(column, 8)
                width = tl.multiple_of(width, 8)
            b_rows = wide_row(arena_ptr, b_row + (rank % _RANKS) * width - column, ALIGNED)
            inside = (n[None, :] >= column[:, None]) & (n[None, :] < (column + width)[:, None])
            b = tl.load(  # stream
                b_rows[:, None] + n[None, :], mask=live[:, None] & inside, other=0.0
            )
            update += tl.sum(b.to(tl.float32) * h[:, None], axis=0)

    if chunks > 0:
        N = wide_size(N, y_ptr, ALIGNED)
        out = wide_row(y_ptr, row * y_row, ALIGNED) + n
        y = tl.load(out, mask=n < N, other=0.0).to(tl.float32) + update
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=n < N)


def launch_lowrank_experts(
    y: Tensor, x: Tensor, expert: Tensor, choices: int, experts: int, *operands: Any
) -> None:
    """lowrank_experts_; operands as its schema names them. Raises TypeError or ValueError."""
    o = Operands(*operands)
    pieces, tiles = tiles_of(o)
    check_rows(y, "y")
    check_rows(x, "x")
    if x.dtype != y.dtype or expert.dtype != torch.int64 or not expert.is_contiguous():
        raise TypeError(
            f"lowrank: x is {x.dtype}, y is {y.dtype}, expert is {expert.dtype}; x and y must be "
            "the same, expert contiguous int64"
        )
    if expert.shape[0] != y.shape[0] or y.shape[0] not in (x.shape[0], x.shape[0] * choices):
        raise ValueError(
            f"lowrank: y has {y.shape[0]} rows, x {x.shape[0]} and expert {expert.shape[0]} for "
            f"{choices} choices of {experts} experts"
        )
    K, N, rows = x.shape[1], y.shape[1], o.tile_height * choices
    wide = o.aligned and aligned(x, y, o.arena)
    shrink, expand = experts_configs(x.dtype, aligned=wide)
    ranks = RANKS_PER_PAGE * max(EXPERT_PAGES, o.most_pages)
    h = torch.empty((len(pieces), rows, ranks), dtype=torch.float32, device=y.device)
    chunks = chunk_programs(o.most_pages, EXPERT_PAGES, len(pieces) * rows)
    shrink_experts_kernel[(len(pieces), rows, chunks)](
        x,
        expert,
        o.arena,
        o.directory,
        o.pages,
        pieces,
        h,
        K,
        o.group,
        o.directory.shape[1],
        choices,
        x.stride(0),
        y.shape[0] // x.shape[0],
        ranks,
        **shrink.keywords,
    )
    expand_experts_kernel[(len(tiles), rows, triton.cdiv(N, EXPERT_COLUMNS))](
        y,
        h,
        expert,
        o.arena,
        o.directory,
        o.pages,
        o.page_scale,
        o.page_shift,
        o.page_kind,
        o.weight,
        pieces,
        tiles,
        N,
        o.group,
        o.directory.shape[1],
        choices,
        y.stride(0),
        ranks,
        **expand.keywords,
    )


_POINTERS = {
    "expert_ptr": "*i64", "directory_ptr": "*i32", "pages_ptr": "*i64", "pieces_ptr": "*i32",
    "h_ptr": "*fp32", "group": "i32", "groups": "i32", "choices": "i32", "ranks": "i32",
}  # fmt: skip


def compilations_for(dtype: torch.dtype, *, wide: bool) -> Iterator[Compilation]:
    """All that lowrank_experts_ launches. wide: as lowrank_triton.compilations_for says."""
    shrink, expand = experts_configs(dtype, aligned=wide)
    row, name = pointer(dtype), f"{pointer(dtype)[1:]}{'' if wide else ', odd'}"
    yield shrink.compilation(
        f"lowrank experts shrink, {name}",
        shrink_experts_kernel,
        _POINTERS | {"x_ptr": row, "arena_ptr": row, "K": "i32", "x_row": "i32", "y_per_x": "i32"},
    )
    yield expand.compilation(
        f"lowrank experts expand, {name}",
        expand_experts_kernel,
        _POINTERS
        | {
            "y_ptr": row,
            "arena_ptr": row,
            "scale_ptr": "*fp32",
            "shift_ptr": "*fp32",
            "kind_ptr": "*i32",
            "weight_ptr": "*fp32",
            "tiles_ptr": "*i32",
            "N": "i32",
            "y_row": "i32",
        },
    )


def compilations() -> Iterator[Compilation]:
    """Configurations in each dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from compilations_for(dtype, wide=True)
