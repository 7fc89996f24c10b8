"""Random batches of drafts for the tests of verify, poisoned where nothing may be read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POISON = -(2**40)  # as a token it equals no other; as a row it lies far outside


@dataclass(frozen=True)
class Drafts:
    """Arguments of verify."""

    sampled: Tensor
    drafted: Tensor
    rows: Tensor
    parent: Tensor


def random_drafts(
    lengths: Sequence[int], seed: int, *, tree: bool, device: torch.device, agreement: float = 0.8
) -> Drafts:
    """Sequences with the given numbers of rows (0: padding), with gaps between them.

    agreement: how often a row drafts what is sampled at its parent.
    """
    rng = random.Random(seed)
    sampled, drafted, parent, rows = [POISON], [POISON], [-(2**30)], []
    for length in lengths:
        begin = len(sampled)
        rows.append((begin, begin + length))
        for row in range(begin, begin + length):
            above = rng.randrange(begin, row) if tree and row > begin else row - 1
            agrees = row > begin and rng.random() < agreement
            sampled.append(rng.randrange(5))
            drafted.append(sampled[above] if agrees else rng.randrange(5))
            parent.append(above)
        drafted[begin : begin + 1] = [POISON] * bool(length)
        parent[begin : begin + 1] = [-(2**30)] * bool(length)
        for filler, value in ((sampled, POISON), (drafted, POISON), (parent, -(2**30))):
            filler.append(value)
    return Drafts(
        torch.tensor(sampled, device=device),
        torch.tensor(drafted, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 2),
        torch.tensor(parent, dtype=torch.int32, device=device),
    )


def as_lists(accepted: Tensor, token: Tensor, path: Tensor) -> list[tuple[int, int, list[int]]]:
    """What verify returns, in the form of its reference; checks that paths end in -1 alone."""
    lines = []
    for line in path.tolist():
        kept = [row for row in line if row >= 0]
        assert line == kept + [-1] * (len(line) - len(kept))
        lines.append(kept)
    return list(zip(accepted.tolist(), token.tolist(), lines, strict=True))
