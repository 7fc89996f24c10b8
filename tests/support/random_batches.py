"""Rows of random batches: which adapter slot each takes, and where each sequence begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Popularity = Literal["identical", "distinct", "uniform", "zipf", "skewed"]
POPULARITIES: tuple[Popularity, ...] = ("identical", "distinct", "uniform", "zipf", "skewed")


def draw_slots(
    popularity: Popularity, count: int, slots: int, generator: torch.Generator
) -> list[int]:
    """The adapter slot of each of `count` requests, out of `slots`.

    identical: all the same; distinct: each its own (around again past the last); uniform: any;
    zipf: slot i with probability ∝ 1 / (i + 1); skewed: half of them slot 0, the others any.
    """
    if popularity == "distinct":
        return [i % slots for i in range(count)]
    index = torch.arange(slots, dtype=torch.float64)
    likelihood = {
        "identical": (index == 0).double(),
        "uniform": torch.ones(slots, dtype=torch.float64),
        "zipf": 1 / (index + 1),
        "skewed": (index == 0).double() + 1 / slots,
    }[popularity]
    drawn: list[int] = torch.multinomial(likelihood, count, True, generator=generator).tolist()
    return drawn


def query_starts(counts: Sequence[int]) -> Tensor:
    """Where the rows of sequences with so many queries begin, and the end: int32 [B + 1]."""
    return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
