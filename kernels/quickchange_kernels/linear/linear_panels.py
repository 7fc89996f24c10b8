"""linear_panels: y = x Wᵀ + b over a weight that was packed in panels.

Contract
    x        [..., K]  float32 or bfloat16; any strides
    panels   of x's dtype, one dimension: W [N, K] as `pack_panels` lays it out
    columns  N
    bias     [N]       or None
    returns  [..., N]  new, contiguous, x's dtype; sums in float32

A panel is 48 rows of W, [K, 48]: what a step along K needs of it is contiguous, and so is all that
a thread reads. Where N is no multiple of 48, the last panel has the remaining rows, filled up with
zeros to a multiple of 16. In bfloat16 two neighbours along K lie together, [K / 2, 48, 2], as the
machine's product of pairs reads them; an odd K is filled up with a zero.

The native version sums an output element over k from the first to the last, in one register, so a
row's result depends neither on the other rows nor on the threads (batch invariance, bitwise): it is
the same in a prompt's chunk and in a step of one row. Rows pass in tiles (8 by 48 columns with
AVX-512) over 64 steps of a panel at a time, which stay in the first-level cache for all tiles;
meanwhile the next 64 come to the second level, a few lines with every four steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native

WIDTH = 48  # columns of a panel, as in csrc/kernels.h
_PART = 16  # the last panel's columns are a multiple of it
PANEL_DTYPES = (torch.float32, torch.bfloat16)


def fills_panels(weight: Tensor) -> bool:
    """True if W's panels have no filling, so that they take the bytes that W takes."""
    columns, features = weight.shape
    return columns % _PART == 0 and features % _depth(weight.dtype) == 0


def pack_panels(weight: Tensor) -> Tensor:
    """W [N, K] in panels: one dimension, W's dtype (float32 or bfloat16)."""
    columns, features = weight.shape
    depth = _depth(weight.dtype)
    steps = -(-features // depth)
    whole = columns // WIDTH * WIDTH
    rest = -(-(columns - whole) // _PART) * _PART
    panels = weight.new_empty((whole + rest) * steps * depth)
    if whole and features % depth == 0:
        _views(panels, whole, steps, depth)[0].copy_(_by_steps(weight[:whole], WIDTH, depth))
    elif whole:
        padded = F.pad(weight[:whole], (0, depth - features % depth))
        _views(panels, whole, steps, depth)[0].copy_(_by_steps(padded, WIDTH, depth))
    if rest:
        last = weight.new_zeros(rest, steps * depth)
        last[: columns - whole, :features] = weight[whole:]
        _views(panels, whole, steps, depth)[1].copy_(_by_steps(last, rest, depth))
    return panels


def unpack_panels(panels: Tensor, columns: int, features: int) -> Tensor:
    """W [columns, features] of `pack_panels`.

    Raises ValueError where the panels are not those of such a weight.
    """
    depth = _depth(panels.dtype)
    steps = -(-features // depth)
    if panels.numel() != -(-columns // _PART) * _PART * steps * depth:
        raise ValueError(
            f"linear_panels: {panels.numel()} elements are not the panels of a weight "
            f"[{columns}, {features}]"
        )
    views = _views(panels, columns // WIDTH * WIDTH, steps, depth)
    parts = [view.transpose(1, 2).reshape(-1, steps * depth) for view in views]
    return torch.cat(parts)[:columns, :features]


def panel_rows(panels: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Rows [..., K] of W [columns, K] by their numbers: W must fill its panels.

    rows: int [...]. Raises IndexError for a number that W doesn't have. A row's numbers stand
    `WIDTH` words of four bytes apart: copy out what is read often.
    """
    rows, words = rows.long(), panels.view(torch.int32)
    steps, whole = words.numel() // columns, columns // WIDTH * WIDTH
    lane = rows % WIDTH
    first = rows - lane  # of the row's panel
    apart = (
        WIDTH if whole == columns else torch.where(first < whole, WIDTH, columns - whole)[..., None]
    )
    at = (first * steps + lane).unsqueeze(-1) + torch.arange(steps, device=rows.device) * apart
    return words.index_select(0, at.view(-1)).view(*rows.shape, steps).view(panels.dtype)


def reference_linear_panels(
    x: Tensor, panels: Tensor, columns: int, bias: Tensor | None = None
) -> Tensor:
    """The operation in float64: [..., N]."""
    y = x.double() @ unpack_panels(panels, columns, x.shape[-1]).double().T
    return y if bias is None else y + bias.double()


def plain_linear_panels(
    x: Tensor, panels: Tensor, columns: int, bias: Tensor | None = None
) -> Tensor:
    """The operation in plain torch, for any device."""
    return F.linear(x, unpack_panels(panels, columns, x.shape[-1]), bias)


def _depth(dtype: torch.dtype) -> int:
    """Neighbours along K that lie together: those of four bytes."""
    return 4 // dtype.itemsize


def _by_steps(rows: Tensor, width: int, depth: int) -> Tensor:
    """Rows [n · width, K] as [n, K / depth, width, depth], a view."""
    return rows.view(-1, width, rows.shape[1] // depth, depth).transpose(1, 2)


def _views(panels: Tensor, whole: int, steps: int, depth: int) -> tuple[Tensor, Tensor]:
    """The whole panels, and the last one: [n, steps, width, depth] each."""
    size = whole * steps * depth
    return (
        panels[:size].view(-1, steps, WIDTH, depth),
        panels[size:].view(1, steps, -1, depth),
    )


def _fake(x: Tensor, panels: Tensor, columns: int, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], columns))


_linear_panels = dispatch.declare(
    "linear_panels",
    "(Tensor x, Tensor panels, int columns, Tensor? bias=None) -> Tensor",
    plain_linear_panels,
    _fake,
)


def linear_panels(x: Tensor, panels: Tensor, columns: int, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over packed weights, on x's device: [..., N]. Contract above."""
    native.ensure()
    y: Tensor = _linear_panels(x, panels, columns, bias)
    return y
