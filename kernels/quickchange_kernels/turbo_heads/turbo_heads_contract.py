"""turbo_heads and head_logits: draft heads of Turbo adapters, any number of them for a row.

    turbo_heads   out[item] = x[row] + SiLU(W z[row] + b),   W and b of the item's matrix
    head_logits   out[item] = W z[row] + b                   (a head's own LM head)

The first is the residual block of a Medusa head (Cai and others, "Medusa: Simple LLM Inference
Acceleration Framework with Multiple Decoding Heads", 2024), where z is x; and, with z = [x; e],
that of a head that also reads the embedding e of the token before (Ankner and others, "Hydra:
Sequentially-Dependent Draft Heads for Medusa Decoding", 2024). The LM head comes after it.

Contract
    x        [T, N]  float32, bfloat16 or float16; rows contiguous (any row stride)
    z        [T, K]  of x's dtype, likewise; may be x itself
    heads    the matrices of all resident adapters; the arena may have another dtype than x
    items    rows and the matrices that they go through; every item stands in exactly one segment
    returns  turbo_heads: [I, N]  new, contiguous, x's dtype; computed in float32 at least and
             rounded once. head_logits: [I, N] float32
A matrix W [N, K] with its bias [N] lies in pages of 16 outputs: 16 rows of W, then their 16 biases,
zeros where N ends first (`in_pages`). Items of one matrix lie side by side, in a segment, so that
its weights are read once for all rows that share it (`HeadItems.of` sorts). The sum of an output
element runs in an order that K alone decides, whatever the other items are. A segment with
begin == end is padding. Rows, places, matrices and offsets out of range, and a matrix of fewer than
ceil(N / 16) pages, raise IndexError on a CPU; on a GPU they must not occur. Knows nothing of
adapters' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native
from quickchange_kernels.index_checks import check_indices, check_ranges, live_ranges

PAGE_ROWS = 16  # outputs in a page


@dataclass(frozen=True)
class HeadTables:
    """Weights of the resident adapters' draft heads. Changes when adapters come and go."""

    arena: Tensor  # [E]
    pages: Tensor  # int64 [P] elements, at multiples of 64 bytes: each page's offset in the arena
    matrices: Tensor  # int32 [G, 2] (first, end): a matrix's pages are pages[first:end]


@dataclass(frozen=True)
class HeadItems:
    """Rows and the matrices that they go through. Made once a step."""

    items: Tensor  # int32 [I, 2] (row of x and z, row of the output), ordered by matrix
    segments: Tensor  # int32 [S, 3] (begin, end, matrix): items [begin, end) go through one matrix

    @classmethod
    def of(cls, wanted: Sequence[tuple[int, int]]) -> HeadItems:
        """Items on the CPU, from the (row, matrix) of each row of the output, in any order."""
        order = sorted(range(len(wanted)), key=lambda place: wanted[place][1])
        segments: list[list[int]] = []
        for i, place in enumerate(order):
            matrix = wanted[place][1]
            if segments and segments[-1][2] == matrix:
                segments[-1][1] = i + 1
            else:
                segments.append([i, i + 1, matrix])
        items = [[wanted[place][0], place] for place in order]
        return cls(
            torch.tensor(items, dtype=torch.int32).view(-1, 2),
            torch.tensor(segments, dtype=torch.int32).view(-1, 3),
        )

    def to(self, device: torch.device) -> HeadItems:
        """The items on another device."""
        return HeadItems(self.items.to(device), self.segments.to(device))


def page_elements(features: int) -> int:
    """Elements in a page of a matrix with `features` inputs."""
    return PAGE_ROWS * (features + 1)


def in_pages(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W [N, K] and b [N] (None: zeros) as pages: [ceil(N / 16), 16 (K + 1)]."""
    rows, features = weight.shape
    count = -(-rows // PAGE_ROWS)
    pages = weight.new_zeros((count, page_elements(features)))
    of_weight, of_bias = pages.split([PAGE_ROWS * features, PAGE_ROWS], dim=1)  # type: ignore[no-untyped-call]
    spare = count * PAGE_ROWS - rows
    of_weight.copy_(F.pad(weight, (0, 0, 0, spare)).view(count, -1))
    if bias is not None:
        of_bias.copy_(F.pad(bias, (0, spare)).view(count, -1))
    return pages


def reference_turbo_heads(x: Tensor, z: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    """turbo_heads in float64."""
    y = reference_head_logits(z, heads, items, x.shape[1])
    own = torch.empty_like(y)
    for row, place in items.items.tolist():
        own[place] = x[row].double()
    return own + y / (1 + (-y).exp())


def reference_head_logits(z: Tensor, heads: HeadTables, items: HeadItems, width: int) -> Tensor:
    """head_logits in float64."""
    out = torch.full((items.items.shape[0], width), float("nan"), dtype=torch.float64)
    for begin, end, matrix in _live(items.segments):
        weight, bias = _matrix(heads.arena, heads.pages, heads.matrices, matrix, z.shape[1], width)
        for row, place in items.items[begin:end].tolist():
            out[place] = weight.double() @ z[row].double() + bias.double()
    return out


def _live(segments: Tensor) -> list[tuple[int, int, int]]:
    """(begin, end, matrix) of the segments that are no padding."""
    return [(begin, end, matrix) for begin, end, matrix in segments.tolist() if begin < end]


def _matrix(
    arena: Tensor, pages: Tensor, matrices: Tensor, matrix: int, features: int, width: int
) -> tuple[Tensor, Tensor]:
    """W [N, K] and b [N] in the arena's dtype."""
    first, end = matrices[matrix].tolist()
    size = page_elements(features)
    held = torch.stack([arena[page : page + size] for page in pages[first:end].tolist()])
    weight, bias = held.split([PAGE_ROWS * features, PAGE_ROWS], dim=1)  # type: ignore[no-untyped-call]
    return weight.reshape(-1, features)[:width], bias.reshape(-1)[:width]


def _check_matrix(
    arena: Tensor, pages: Tensor, matrices: Tensor, matrix: int, features: int, width: int
) -> None:
    """Raise IndexError for a matrix that is not there, or whose pages are not."""
    check_indices("turbo_heads: segments' matrix", torch.tensor([matrix]), matrices.shape[0])
    used = matrices[matrix]
    check_ranges("turbo_heads: matrices", used[None], pages.shape[0])
    first, end = used.tolist()
    wanted = -(-width // PAGE_ROWS)
    if end - first < wanted:
        raise IndexError(
            f"turbo_heads: matrices[{matrix}] has {end - first} pages; the outputs need {wanted}"
        )
    room = arena.numel() - page_elements(features) + 1
    check_indices("turbo_heads: pages", pages[first:end], max(0, room))


def plain_turbo_heads(
    x: Tensor,
    z: Tensor,
    arena: Tensor,
    pages: Tensor,
    matrices: Tensor,
    items: Tensor,
    segments: Tensor,
) -> Tensor:
    """turbo_heads in plain torch, for any device."""
    y = plain_head_logits(z, arena, pages, matrices, items, segments, x.shape[1])
    row, place = items.long().unbind(1)
    own = torch.empty_like(y)
    own[place] = x[row].float()
    return (own + F.silu(y)).to(x.dtype)


def plain_head_logits(
    z: Tensor,
    arena: Tensor,
    pages: Tensor,
    matrices: Tensor,
    items: Tensor,
    segments: Tensor,
    width: int,
) -> Tensor:
    """head_logits in plain torch, for any device."""
    out = z.new_empty((items.shape[0], width), dtype=torch.float32)
    check_ranges("turbo_heads: segments", live_ranges(segments)[:, :2], items.shape[0])
    for begin, end, matrix in _live(segments):
        _check_matrix(arena, pages, matrices, matrix, z.shape[1], width)
        check_indices("turbo_heads: items' row", items[begin:end, 0], z.shape[0])
        check_indices("turbo_heads: items' place", items[begin:end, 1], items.shape[0])
        weight, bias = _matrix(arena, pages, matrices, matrix, z.shape[1], width)
        rows, places = items[begin:end].long().unbind(1)
        out[places] = F.linear(z[rows].float(), weight.float(), bias.float())
    return out


def _fake_turbo_heads(
    x: Tensor,
    z: Tensor,  # noqa: ARG001
    arena: Tensor,  # noqa: ARG001
    pages: Tensor,  # noqa: ARG001
    matrices: Tensor,  # noqa: ARG001
    items: Tensor,
    segments: Tensor,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((items.shape[0], x.shape[1]))


def _fake_head_logits(
    z: Tensor,
    arena: Tensor,  # noqa: ARG001
    pages: Tensor,  # noqa: ARG001
    matrices: Tensor,  # noqa: ARG001
    items: Tensor,
    segments: Tensor,  # noqa: ARG001
    width: int,
) -> Tensor:
    return z.new_empty((items.shape[0], width), dtype=torch.float32)


_TABLES = "Tensor arena, Tensor pages, Tensor matrices, Tensor items, Tensor segments"
_turbo_heads = dispatch.declare(
    "turbo_heads",
    f"(Tensor x, Tensor z, {_TABLES}) -> Tensor",
    plain_turbo_heads,
    _fake_turbo_heads,
)
_head_logits = dispatch.declare(
    "head_logits",
    f"(Tensor z, {_TABLES}, int width) -> Tensor",
    plain_head_logits,
    _fake_head_logits,
)
dispatch.triton_version(
    "turbo_heads", "quickchange_kernels.turbo_heads.turbo_heads_triton:launch_turbo_heads"
)
dispatch.triton_version(
    "head_logits", "quickchange_kernels.turbo_heads.turbo_heads_triton:launch_head_logits"
)


def turbo_heads(x: Tensor, z: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    """x + SiLU(W z + b) of each item, on x's device: [I, N]. Contract above.

    Raises ValueError where x and z are not [T, N] and [T, K] of one dtype.
    """
    _check_rows("turbo_heads", "x", x)
    _check_rows("turbo_heads", "z", z)
    if x.shape[0] != z.shape[0] or x.dtype != z.dtype:
        raise ValueError(
            f"turbo_heads: x is {x.dtype} {list(x.shape)} and z {z.dtype} {list(z.shape)}; they "
            "must have as many rows and one dtype"
        )
    native.ensure()
    tables = (heads.arena, heads.pages, heads.matrices)
    out: Tensor = _turbo_heads(x, z, *tables, items.items, items.segments)
    return out


def head_logits(z: Tensor, heads: HeadTables, items: HeadItems, width: int) -> Tensor:
    """W z + b of each item, on z's device: float32 [I, N], with N = width. Contract above.

    Raises ValueError where z is not [T, K] with contiguous rows.
    """
    _check_rows("head_logits", "z", z)
    native.ensure()
    tables = (heads.arena, heads.pages, heads.matrices)
    out: Tensor = _head_logits(z, *tables, items.items, items.segments, width)
    return out


def _check_rows(operation: str, name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or rows.stride(1) != 1:
        raise ValueError(
            f"{operation}: {name} of shape {list(rows.shape)} and strides {rows.stride()}; it must "
            "be a matrix with contiguous rows"
        )
