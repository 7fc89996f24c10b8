"""Runs one scheduled step on the model: flattened rows in, one sampled token a sampling row out.

The only place where the scheduler's plan becomes tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from quickchange_kernels.lowrank import LowRankTables
from quickchange_server.adapters.batch import Run, segments
from quickchange_server.engine.sampler import RowError, Sampled, Sampler, SampleRow
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.model import attention
from quickchange_server.model.attention import PagedAttention
from quickchange_server.model.load import LoadedModel, forward
from quickchange_server.model.step import AdapterBatch, AttentionBatch, Step


class Runner:
    """Owner of the model, the KV pages and the sampler."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._device = device
        self._sampler = Sampler(model.vocabulary, device)
        attention.install(
            model.module,
            PagedAttention(model.layers, num_blocks, block_size, dtype, device, model.holder),
        )

    def run(
        self, plan: Sequence[Scheduled], tables: LowRankTables | None
    ) -> list[Sampled | RowError]:
        """Compute `plan`; one result for each item that samples, in the plan's order.

        `tables` are the adapters on the device, None where the server has none.
        """
        sampling = [item for item in plan if item.samples]
        ends = list(accumulate(item.count for item in plan))
        sample_rows = [end - 1 for item, end in zip(plan, ends, strict=True) if item.samples]
        holder = self._model.holder
        holder.step = Step(self._attention_batch(plan, ends), self._adapter_batch(plan, tables))
        try:
            logits = forward(
                self._model.module,
                torch.tensor([token for item in plan for token in _tokens(item)]),
                torch.tensor([position for item in plan for position in _positions(item)]),
                torch.tensor(sample_rows, dtype=torch.long),
            )
        finally:
            holder.step = None
        if not sampling:
            return []
        return self._sampler.sample(logits.float(), [_sample_row(item) for item in sampling])

    def _attention_batch(self, plan: Sequence[Scheduled], ends: list[int]) -> AttentionBatch:
        size = self._block_size
        widest = max(len(item.sequence.blocks) for item in plan)
        tables = [
            item.sequence.blocks + [0] * (widest - len(item.sequence.blocks)) for item in plan
        ]
        slots = [
            item.sequence.blocks[position // size] * size + position % size
            for item in plan
            for position in _positions(item)
        ]
        lengths = [item.sequence.computed + item.count for item in plan]
        return AttentionBatch(
            slots=torch.tensor(slots, dtype=torch.long).to(self._device),
            block_tables=torch.tensor(tables, dtype=torch.int32).to(self._device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32).to(self._device),
            query_start=torch.tensor([0, *ends], dtype=torch.int32).to(self._device),
        )

    def _adapter_batch(
        self, plan: Sequence[Scheduled], tables: LowRankTables | None
    ) -> AdapterBatch | None:
        if tables is None or not any(item.components for item in plan):
            return None
        return AdapterBatch(
            tables=tables,
            tokens=segments([Run(item.count, item.components) for item in plan], self._device),
            samples=segments(
                [Run(1, item.components) for item in plan if item.samples], self._device
            ),
        )


def _positions(item: Scheduled) -> range:
    return range(item.sequence.computed, item.sequence.computed + item.count)


def _tokens(item: Scheduled) -> list[int]:
    sequence = item.sequence
    return sequence.tokens[sequence.computed : sequence.computed + item.count]


def _sample_row(item: Scheduled) -> SampleRow:
    sequence = item.sequence
    return SampleRow(
        params=sequence.sampling,
        position=len(sequence.tokens),
        prompt=sequence.tokens[: sequence.prompt_length],
        output=sequence.tokens[sequence.prompt_length :],
    )
