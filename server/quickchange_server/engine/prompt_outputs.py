"""Prompt log-probabilities and embeddings, read from a step's rows for the requests that want them.

An embedding is made of the hidden states that enter the LM head: after the model's final norm, with
what the request's adapters have added. They are summed in float64. A log-probability is float32
log_softmax of the model's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quickchange_server.engine.sampler import best_first, top_count
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.protocol import TokenLogprobs


@torch.inference_mode()
def read(plan: Sequence[Scheduled], logits: Tensor, hidden: Tensor) -> None:
    """Pass prompt rows to the sequences that read them.

    logits [C, V] of the scored rows, hidden [P, H] of the pooled rows, both in the plan's order.
    """
    if scored := [item for item in plan if item.scored]:
        _read_scores(scored, logits)
    if pooled := [item for item in plan if item.pooled]:
        _read_states(pooled, hidden)


def _read_scores(items: Sequence[Scheduled], logits: Tensor) -> None:
    targets: list[int] = []
    for item in items:
        targets += item.sequence.tokens[item.scored.start + 1 : item.scored.stop + 1]
    most = max(item.sequence.reading.top or 0 for item in items if item.sequence.reading)
    table = torch.log_softmax(logits.float(), dim=-1)
    parts = [table.gather(1, torch.tensor(targets, device=table.device)[:, None]).double()]
    if most:
        best = table.topk(top_count(most, table.shape[1]), dim=-1)
        parts += [best.indices.double(), best.values.double()]
    lines = iter(zip(targets, torch.cat(parts, dim=1).tolist(), strict=True))
    for item in items:
        if (reading := item.sequence.reading) is not None:
            own = [next(lines) for _ in item.scored]
            reading.add_scores(
                [
                    TokenLogprobs(target, line[0], best_first(line[1:], reading.top or 0))
                    for target, line in own
                ]
            )


def _read_states(items: Sequence[Scheduled], hidden: Tensor) -> None:
    counts = [len(item.pooled) for item in items]
    owner = torch.from_numpy(np.repeat(np.arange(len(items)), counts)).to(hidden.device)
    sums = hidden.new_zeros((len(items), hidden.shape[1]), dtype=torch.float64)
    sums.index_add_(0, owner, hidden.double())
    for item, total, count in zip(items, sums.cpu().numpy(), counts, strict=True):
        if (reading := item.sequence.reading) is not None:
            reading.add_states(total, count)
