"""Prompt log-probabilities and embeddings, read from a step's rows for the requests that want them.

An embedding is made of the hidden states that enter the LM head: after the model's final norm, with
what the request's adapters have added. They are summed in float64. A log-probability is float32
log_softmax of the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quickchange_server.engine.sampler import best_first, top_count
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Reading, fault_of, isolated
from quickchange_server.protocol import TokenLogprobs


@torch.inference_mode()
def read(plan: Sequence[Scheduled], logits: Tensor, hidden: Tensor, faults: dict[str, str]) -> None:
    """Pass prompt rows to the sequences that read them; errors of one sequence go to `faults`, by
    request id.

    logits [C, V] of the scored rows, hidden [P, H] of the pooled rows, both in the plan's order.
    """
    _pass_on([item for item in plan if item.scored], logits, _scored_rows, _scores, faults)
    _pass_on([item for item in plan if item.pooled], hidden, _pooled_rows, _states, faults)


SCORED_AT_ONCE = 256  # rows: in float32 those of a whole prefill would take gigabytes

Add = Callable[[Reading], None]


def _pass_on(
    items: Sequence[Scheduled],
    rows: Tensor,
    count: Callable[[Scheduled], int],
    read_rows: Callable[[Sequence[Scheduled], Tensor], list[Add]],
    faults: dict[str, str],
) -> None:
    parts = torch.split(rows, [count(item) for item in items])
    own = {item.sequence.request_id: part for item, part in zip(items, parts, strict=True)}

    def read_own(some: Sequence[Scheduled]) -> list[Add]:
        if len(some) == len(items):
            return read_rows(some, rows)
        return read_rows(some, torch.cat([own[item.sequence.request_id] for item in some]))

    sound, adds = isolated(items, read_own, faults) if items else (items, [])
    for item, add in zip(sound, adds or (), strict=True):
        if (reading := item.sequence.reading) is not None:
            try:
                add(reading)
            except BaseException as error:
                faults[item.sequence.request_id] = fault_of(error)


def _scored_rows(item: Scheduled) -> int:
    return len(item.scored)


def _pooled_rows(item: Scheduled) -> int:
    return len(item.pooled)


def _scores(items: Sequence[Scheduled], logits: Tensor) -> list[Add]:
    targets: list[int] = []
    for item in items:
        targets += item.sequence.tokens[item.scored.start + 1 : item.scored.stop + 1]
    most = max(item.sequence.reading.top or 0 for item in items if item.sequence.reading)
    wanted = torch.tensor(targets, device=logits.device)
    found = [
        score_columns(*part, most)
        for part in zip(
            torch.split(logits, SCORED_AT_ONCE), torch.split(wanted, SCORED_AT_ONCE), strict=True
        )
    ]
    lines = iter(zip(targets, torch.cat(found).tolist(), strict=True))
    return [_add_scores([next(lines) for _ in item.scored]) for item in items]


def score_columns(logits: Tensor, targets: Tensor, most: int) -> Tensor:
    """Log-probabilities of the targets, then ids and log-probabilities of the `most` best tokens:
    float64 [rows, 1 or more]."""
    table = torch.log_softmax(logits.float(), dim=-1)
    parts = [table.gather(1, targets[:, None]).double()]
    if most:
        best = table.topk(top_count(most, table.shape[1]), dim=-1)
        parts += [best.indices.double(), best.values.double()]
    return torch.cat(parts, dim=1)


def _add_scores(lines: Sequence[tuple[int, list[float]]]) -> Add:
    def add(reading: Reading) -> None:
        reading.add_scores(
            [
                TokenLogprobs(target, line[0], best_first(line[1:], reading.top or 0))
                for target, line in lines
            ]
        )

    return add


def _states(items: Sequence[Scheduled], hidden: Tensor) -> list[Add]:
    counts = [len(item.pooled) for item in items]
    owner = torch.from_numpy(np.repeat(np.arange(len(items)), counts)).to(hidden.device)
    sums = hidden.new_zeros((len(items), hidden.shape[1]), dtype=torch.float64)
    sums.index_add_(0, owner, hidden.double())
    return [
        partial(Reading.add_states, total=total, rows=count)
        for total, count in zip(sums.cpu().numpy(), counts, strict=True)
    ]
