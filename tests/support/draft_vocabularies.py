"""Random cases of draft_logits, with NaN where nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAN = float("nan")
TOKENS = 300


class DraftCase(NamedTuple):
    """draft_logits' arguments."""

    h: Tensor
    weight: Tensor
    vocabulary: Tensor
    segments: Tensor
    width: int
    bias: Tensor | None = None

    def to(self, device: torch.device) -> DraftCase:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        tensors = (t.to(device) for t in (self.h, self.weight, self.vocabulary, self.segments))
        return DraftCase(*tensors, self.width, bias)


def random_case(
    parts: Sequence[tuple[int, int]],
    features: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    *,
    biased: bool = False,
    spare: int = 0,
) -> DraftCase:
    """A segment for each (rows, tokens), and an empty one before and after; rows are strided. The
    result has `spare` columns more than the longest list of tokens."""
    vocabulary, segments, row, first = [], [(0, 0, 2**30, 2**30)], 0, 0
    for rows, tokens in parts:
        order = torch.randperm(TOKENS, generator=generator)[:tokens]
        vocabulary.append(order.sort().values.int())
        segments.append((row, row + rows, first, first + tokens))
        row, first = row + rows, first + tokens
    segments.append((row, row, 2**30, 2**30))
    weight = torch.full((TOKENS, features), NAN)
    bias = torch.full((TOKENS,), NAN)
    named = torch.cat([torch.empty(0, dtype=torch.int32), *vocabulary])
    used = named.long().unique()
    weight[used] = torch.randn(len(used), features, generator=generator)
    bias[used] = torch.randn(len(used), generator=generator)
    h = torch.full((row, features + 3), NAN, dtype=dtype)[:, 3:]
    h.copy_(torch.randn(row, features, generator=generator))
    return DraftCase(
        h,
        weight.to(weight_dtype),
        named,
        torch.tensor(segments, dtype=torch.int32),
        max((tokens for _, tokens in parts), default=0) + spare,
        bias.to(weight_dtype) if biased else None,
    )
