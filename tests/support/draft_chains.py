"""Random batches of drafts for the tests of verify, poisoned where nothing may be read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POISON = -(2**40)  # as a token it equals no other


class Drafts(NamedTuple):
    """Arguments of verify."""

    sampled: Tensor
    drafted: Tensor
    rows: Tensor


def random_drafts(
    lengths: Sequence[int], seed: int, device: torch.device, *, agreement: float
) -> Drafts:
    """Sequences with the given numbers of rows (0: padding), with gaps between them.

    agreement: how often a row drafts what is sampled at the row before.
    """
    rng = random.Random(seed)
    sampled, drafted, rows = [POISON], [POISON], []
    for length in lengths:
        begin = len(sampled)
        rows.append((begin, begin + length))
        for row in range(begin, begin + length):
            agrees = row > begin and rng.random() < agreement
            drafted.append(sampled[-1] if agrees else rng.randrange(5))
            sampled.append(rng.randrange(5))
        drafted[begin : begin + 1] = [POISON] * bool(length)
        sampled.append(POISON)
        drafted.append(POISON)
    return Drafts(
        torch.tensor(sampled, device=device),
        torch.tensor(drafted, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 2),
    )


def as_lists(accepted: Tensor, token: Tensor, path: Tensor) -> list[tuple[int, int, list[int]]]:
    """What verify returns, in the form of its reference; checks that paths end in -1 alone."""
    lines = []
    for line in path.tolist():
        kept = [row for row in line if row >= 0]
        assert line == kept + [-1] * (len(line) - len(kept))
        lines.append(kept)
    return list(zip(accepted.tolist(), token.tolist(), lines, strict=True))
