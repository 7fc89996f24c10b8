"""turbo_heads: the drafting heads of Turbo adapters, for rows with any number of heads or none.

    out[item] = x[row] + SiLU(W x[row] + b),   W and b of the item's head

This is the residual block of a Medusa head (Cai and others, "Medusa: Simple LLM Inference
Acceleration Framework with Multiple Decoding Heads", 2024); the shared LM head comes after it.

Contract
    x        [T, H]  float32, bfloat16 or float16; rows contiguous (any row stride)
    heads    of all resident adapters; the arena may have another dtype than x
    items    which row goes through which head; every item stands in exactly one segment
    returns  [I, H]  new, contiguous, x's dtype; computed in float32 at least and rounded once
Items of one head lie side by side, in a segment, so that its weights are read once for all rows
that share it (`HeadItems.of` sorts). The sum of an output element runs in an order that H alone
decides, whatever the other items are. A segment with begin == end is padding. Rows, places, heads
and offsets are trusted to be in range. Knows nothing of adapters' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native


@dataclass(frozen=True)
class HeadTables:
    """Where the heads' weights lie. Changes when adapters come and go."""

    arena: Tensor  # [E]
    offsets: Tensor  # int64 [G, 2] elements: W [H, H] (out, in), at a multiple of 64 bytes; b [H]


@dataclass(frozen=True)
class HeadItems:
    """Which rows go through which heads. Made once a step."""

    items: Tensor  # int32 [I, 2] (row of x, row of the output), ordered by head
    segments: Tensor  # int32 [S, 3] (begin, end, head): items [begin, end) go through one head

    @classmethod
    def of(cls, wanted: Sequence[tuple[int, int]]) -> HeadItems:
        """On the CPU, from the (row, head) of each row of the output, in any order."""
        order = sorted(range(len(wanted)), key=lambda place: wanted[place][1])
        segments: list[list[int]] = []
        for i, place in enumerate(order):
            head = wanted[place][1]
            if segments and segments[-1][2] == head:
                segments[-1][1] = i + 1
            else:
                segments.append([i, i + 1, head])
        items = [[wanted[place][0], place] for place in order]
        return cls(
            torch.tensor(items, dtype=torch.int32).view(-1, 2),
            torch.tensor(segments, dtype=torch.int32).view(-1, 3),
        )

    def to(self, device: torch.device) -> HeadItems:
        """The same on another device."""
        return HeadItems(self.items.to(device), self.segments.to(device))


def reference_turbo_heads(x: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    """The operation in float64."""
    out = torch.full((items.items.shape[0], x.shape[1]), float("nan"), dtype=torch.float64)
    for begin, end, head in _live(items.segments):
        weight, bias = _weights(heads.arena, heads.offsets, head, x.shape[1])
        for row, place in items.items[begin:end].tolist():
            z = weight.double() @ x[row].double() + bias.double()
            out[place] = x[row].double() + z / (1 + (-z).exp())
    return out


def _live(segments: Tensor) -> list[tuple[int, int, int]]:
    """(begin, end, head) of the segments that are no padding."""
    return [(begin, end, head) for begin, end, head in segments.tolist() if begin < end]


def _weights(arena: Tensor, offsets: Tensor, head: int, width: int) -> tuple[Tensor, Tensor]:
    """W [H, H] and b [H] in the arena's dtype."""
    w, b = offsets[head].tolist()
    return arena[w : w + width * width].view(width, width), arena[b : b + width]


def plain_turbo_heads(
    x: Tensor, arena: Tensor, offsets: Tensor, items: Tensor, segments: Tensor
) -> Tensor:
    """The operation in plain torch, for any device."""
    out = torch.empty((items.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    for begin, end, head in _live(segments):
        weight, bias = _weights(arena, offsets, head, x.shape[1])
        rows, places = items[begin:end].long().unbind(1)
        own = x[rows].float()
        out[places] = (own + F.silu(F.linear(own, weight.float(), bias.float()))).to(x.dtype)
    return out


def _fake(
    x: Tensor,
    arena: Tensor,  # noqa: ARG001
    offsets: Tensor,  # noqa: ARG001
    items: Tensor,
    segments: Tensor,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((items.shape[0], x.shape[1]))


_turbo_heads = dispatch.declare(
    "turbo_heads",
    "(Tensor x, Tensor arena, Tensor offsets, Tensor items, Tensor segments) -> Tensor",
    plain_turbo_heads,
    _fake,
)
dispatch.triton_version("turbo_heads", "quickchange_kernels.turbo_heads_triton:launch_turbo_heads")


def turbo_heads(x: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    """The operation on x's device. Contract above; raises ValueError where x is not [T, H]."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"turbo_heads: x of shape {tuple(x.shape)} and strides {x.stride()}; it must be [T, H] "
            "with contiguous rows"
        )
    native.ensure()
    out: Tensor = _turbo_heads(x, heads.arena, heads.offsets, items.items, items.segments)
    return out
