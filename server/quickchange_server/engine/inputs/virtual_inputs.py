"""Virtual tokens that a step is given, on the host: the plan's, with their rows and KV slots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.virtual_rows import VirtualRows


def virtual_inputs(plan: Sequence[Scheduled], block_size: int) -> VirtualRows | None:
    """What the plan's items are given of virtual tokens; None: nothing, as nearly always.

    A text's first chunk has all of them that were found in no cached block. Raises RuntimeError
    where a sequence runs without its prompt.
    """
    if not any(item.virtual for item in plan):
        return None
    rows: list[int] = []
    vectors: list[Tensor] = []
    slots: list[int] = []
    cache: list[Tensor] = []
    starts = list(accumulate([item.rows for item in plan], initial=0))
    for item, start in zip(plan, starts[:-1], strict=True):
        if not item.virtual:
            continue
        sequence, held = item.sequence, item.sequence.prompt
        if held is None:
            raise RuntimeError(f"{sequence.request_id} runs without its virtual tokens")
        values = held.values[item.virtual.start : item.virtual.stop]
        if held.cached:
            blocks = sequence.blocks
            slots += [
                blocks[at // block_size] * block_size + at % block_size for at in item.virtual
            ]
            cache.append(values)
        else:
            rows += [start + at - item.first for at in item.virtual]
            vectors.append(values)
    return VirtualRows(
        torch.tensor(rows) if rows else None,
        torch.cat(vectors) if vectors else None,
        torch.tensor(slots) if slots else None,
        torch.cat(cache) if cache else None,
    )
