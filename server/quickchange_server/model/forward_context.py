"""Context of one forward pass: the batch that the seams in the model read.

The runner puts a `ForwardContext` into the `StepHolder` that it shares with the wrapped modules and
takes it out afterwards. Row order is the flattened batch's: sequence after sequence, T token rows
in all, of which R rows are asked for: those that are sampled or scored, which the LM head reads,
then those that are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, Segments
from quickchange_server.model.virtual_rows import VirtualRows

ZERO_STATE = 0  # state row that is zero and stays so
SPARE_STATE = 1  # state row that takes what nobody reads: padding's states
FIRST_STATE = 2  # first of the state rows that sequences hold


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """KV slots of the rows, and the keys that each query sees."""

    slots: torch.Tensor  # int64 [T]: block * block_size + offset; -1: padding, written nowhere
    block_tables: torch.Tensor  # int32 [B, M]
    seq_lens: torch.Tensor  # int32 [B]: keys of each sequence, this step's included
    query_start: torch.Tensor  # int32 [B + 1]: first row of each sequence


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """Segments of rows under adapter slots. Absent from a step without adapters."""

    tables: LowRankTables
    tokens: Segments  # over the T token rows
    samples: Segments  # over the R rows that are asked for
    head: Segments  # over those of them that the LM head reads, from the first


@dataclass(frozen=True, slots=True)
class StatePart:
    """Rows that a recurrent layer computes in one call: equally many of each of its sequences."""

    rows: torch.Tensor | None  # int64 [sequences · length]: rows of the step; None: all, in order
    length: int  # rows of each sequence
    # int64 [sequences]: the state that each begins with; None: all begin with none
    read: torch.Tensor | None
    write: torch.Tensor  # int64 [sequences]: where the state after its last row is kept
    adapters: AdapterBatch | None  # over these rows; None if none has an adapter


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The batch of one forward pass; adapters: None if no row has one."""

    attention: AttentionBatch
    adapters: AdapterBatch | None
    states: tuple[StatePart, ...] = ()  # in order of computation; for models with states alone
    # int64 [T]: tokens of the text that each row's position is scaled for; None: no model needs it
    reach: torch.Tensor | None = None
    virtual: VirtualRows | None = None


class StepHolder:
    """Holds the context of the running step. One per model; for the engine thread alone."""

    def __init__(self) -> None:
        self.step: ForwardContext | None = None
