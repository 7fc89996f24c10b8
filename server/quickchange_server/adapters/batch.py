"""From a step's sequences to segments: which rows take which adapter slot at which weight.

Neighbouring sequences under the same composition become one segment. Rows without an adapter are in
no segment and cost nothing; a composition is several segments over the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from quickchange_kernels.lowrank import Segments

Components = tuple[tuple[int, float], ...]  # (device slot, weight) of each adapter


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` neighbouring rows under one composition."""

    rows: int
    components: Components


def segments(runs: Sequence[Run], device: torch.device) -> Segments:
    """Segments over the rows of `runs`, laid one after the other from row 0."""
    rows: list[tuple[int, int]] = []
    slots: list[int] = []
    weights: list[float] = []
    begin = 0
    for components, group in groupby(runs, key=lambda run: run.components):
        end = begin + sum(run.rows for run in group)
        if end > begin:
            for slot, weight in components:
                rows.append((begin, end))
                slots.append(slot)
                weights.append(weight)
        begin = end
    return Segments(
        rows=torch.tensor(rows, dtype=torch.int32).view(-1, 2).to(device),
        slot=torch.tensor(slots, dtype=torch.int32).to(device),
        weight=torch.tensor(weights, dtype=torch.float32).to(device),
    )
