"""What the seams in the model read during one forward pass.

The runner puts a `ForwardContext` into the `StepHolder` that it shares with the wrapped modules and
takes it out afterwards. Row order is the flattened batch's: sequence after sequence, T token rows
in all, of which R rows (the last of each sequence that samples) go through the LM head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, Segments


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each row's keys and values go and what each query sees."""

    slots: torch.Tensor  # int64 [T]: block * block_size + offset; -1: padding, written nowhere
    block_tables: torch.Tensor  # int32 [B, M]
    seq_lens: torch.Tensor  # int32 [B]: keys of each sequence, this step's included
    query_start: torch.Tensor  # int32 [B + 1]: first row of each sequence


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """Which rows take which adapter slots. Absent from a step in which no row has an adapter."""

    tables: LowRankTables
    tokens: Segments  # over the T token rows
    samples: Segments  # over the R rows that the LM head sees


@dataclass(frozen=True, slots=True)
class ForwardContext:
    attention: AttentionBatch
    adapters: AdapterBatch | None


class StepHolder:
    """The step under way, or None between steps. One a model; the engine thread's."""

    def __init__(self) -> None:
        self.step: ForwardContext | None = None
