"""Prompt log-probabilities and embeddings, read from a step's rows for the requests that want them.

An embedding is made of the hidden states that enter the LM head: after the model's final norm, with
what the request's adapters have added. They are summed in float64. A log-probability is float32
log_softmax of the model's own logits. All is computed on the device; `pass_on` takes what has come
to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quickchange_server.engine.sampler import best_first, runs_alike
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Reading, fault_of
from quickchange_server.protocol import TokenLogprobs

_SCORED_AT_ONCE = 256  # rows: in float32 those of a whole prefill would take gigabytes


@dataclass(frozen=True, slots=True)
class ReadInputs:
    """What the scored and the pooled rows of a step are read for, in the plan's order."""

    targets: Tensor  # int64 [C] the token that each scored row's log-probability is wanted of
    runs: tuple[tuple[int, int], ...]  # `runs_alike` by the best tokens wanted besides
    owners: Tensor  # int64 [P] the item of each pooled row, among those that pool
    items: int  # that pool


@dataclass(frozen=True, slots=True)
class ReadRows:
    """What was read of a step's rows."""

    # float64 [c, 1 + 2n] of runs of scored rows: log-probability, n best ids, n best values
    scores: tuple[Tensor, ...]
    sums: Tensor | None  # float64 [items, H] of the pooled rows' hidden states


def read_inputs(plan: Sequence[Scheduled]) -> ReadInputs | None:
    """What the plan's rows are read for, on the host; None if they are not."""
    targets: list[int] = []
    tops: list[int] = []
    pooled: list[int] = []
    for item in plan:
        reading = item.sequence.reading
        if reading is not None and item.scored:
            targets += _targets(item)
            tops += [reading.top or 0] * len(item.scored)
        elif reading is not None and item.pooled:
            pooled.append(len(item.pooled))
    if not targets and not pooled:
        return None
    owners = np.repeat(np.arange(len(pooled)), pooled)
    return ReadInputs(
        torch.tensor(targets, dtype=torch.int64),
        runs_alike(tops),
        torch.from_numpy(owners),
        len(pooled),
    )


@torch.inference_mode()
def read(logits: Tensor, hidden: Tensor, inputs: ReadInputs) -> ReadRows:
    """Read logits [C, V] of the scored rows and hidden [P, H] of the pooled rows."""
    scores: list[Tensor] = []
    sums = None
    begin = 0
    for length, count in inputs.runs:
        end = begin + length
        for first in range(begin, end, _SCORED_AT_ONCE):
            rows = slice(first, min(first + _SCORED_AT_ONCE, end))
            scores.append(_score_columns(logits[rows], inputs.targets[rows], count))
        begin = end
    if len(hidden):
        sums = hidden.new_zeros((inputs.items, hidden.shape[1]), dtype=torch.float64)
        sums.index_add_(0, inputs.owners, hidden.double())
    return ReadRows(tuple(scores), sums)


def _score_columns(logits: Tensor, targets: Tensor, count: int) -> Tensor:
    """Columns of `ReadRows.scores` of these rows, with so many best tokens."""
    table = torch.log_softmax(logits.float(), dim=-1)
    parts = [table.gather(1, targets[:, None]).double()]
    if count:
        best = table.topk(min(count, table.shape[1]), dim=-1)
        parts += [best.indices.double(), best.values.double()]
    return torch.cat(parts, dim=1)


def pass_on(plan: Sequence[Scheduled], rows: ReadRows, faults: dict[str, str]) -> None:
    """Pass what was read, on the host, to the plan's sequences; errors of one sequence go to
    `faults`, by request id."""
    lines = iter([line for part in rows.scores for line in part.tolist()])
    sums = iter(() if rows.sums is None else rows.sums.numpy())
    for item in plan:
        reading = item.sequence.reading
        if reading is None:
            continue
        own = [next(lines) for _ in item.scored]
        total = next(sums) if item.pooled else None
        try:
            if own:
                reading.add_scores(_scores(item, own, reading))
            if total is not None:
                reading.add_states(total, len(item.pooled))
        except BaseException as error:
            faults[item.sequence.request_id] = fault_of(error)


def _targets(item: Scheduled) -> list[int]:
    return item.sequence.ids(item.scored.start + 1, len(item.scored))


def _scores(
    item: Scheduled, lines: Sequence[Sequence[float]], reading: Reading
) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(target, line[0], best_first(line[1:], reading.top or 0))
        for target, line in zip(_targets(item), lines, strict=True)
    ]
