"""Runs one scheduled step on the model: flattened rows in, one sampled token a sampling row out.

Decode steps run from captured graphs where the device has them; all else is one path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickchange_kernels.lowrank import LowRankTables
from quickchange_server.engine.buckets import DecodeBuckets
from quickchange_server.engine.inputs import StepInputs, exact_extent, step_inputs
from quickchange_server.engine.sampler import RowError, Sampled, Sampler, SampleRow
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.engine.window import Window
from quickchange_server.model import attention
from quickchange_server.model.attention import PagedAttention
from quickchange_server.model.graphs import Graphs, capture_for
from quickchange_server.model.load import LoadedModel, forward
from quickchange_server.model.staging import upload


class Runner:
    """Owner of the model, the KV pages and the sampler."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._device = device
        self._sampler = Sampler(model.vocabulary, device)
        capture = capture_for(device)
        self._graphs = None if capture is None else Graphs(self._compute, capture, device)
        self._buckets = DecodeBuckets(max_sequences, -(-max_model_len // block_size))
        attention.install(
            model.module,
            PagedAttention(model.layers, num_blocks, block_size, dtype, device, model.holder),
        )

    def warm_up(self, tables: LowRankTables | None) -> None:
        """Capture every graph, so that no request has to wait for one."""
        if self._graphs is None:
            return
        for adapters in (False, True) if tables is not None else (False,):
            for extent in self._buckets.extents(adapters=adapters):
                nothing = step_inputs((), extent, self._block_size)
                self._graphs.run(extent, nothing, tables if adapters else None)

    def run(
        self, plan: Sequence[Scheduled], tables: LowRankTables | None
    ) -> list[Sampled | RowError]:
        """Compute `plan`; one result for each item that samples, in the plan's order.

        `tables` are the adapters on the device, None where the server has none.
        """
        adapters = any(item.components for item in plan)
        logits = self._logits(plan, tables if adapters else None)
        sampling = [_sample_row(item) for item in plan if item.samples]
        return self._sampler.sample(logits, sampling) if sampling else []

    def _logits(self, plan: Sequence[Scheduled], tables: LowRankTables | None) -> Tensor:
        """[samples, V]. tables: None where no row of the plan has an adapter."""
        adapters = tables is not None
        if self._graphs is not None:
            extent = self._buckets.fit(plan, adapters=adapters)
            if extent is not None:
                inputs = step_inputs(plan, extent, self._block_size)
                return self._graphs.run(extent, inputs, tables)[: len(plan)]
        extent = exact_extent(plan, self._device, adapters=adapters)
        inputs = step_inputs(plan, extent, self._block_size)
        return self._compute(upload(inputs, self._device), tables)

    def _compute(self, inputs: StepInputs, tables: LowRankTables | None) -> Tensor:
        """Logits [R, V] of inputs on the device."""
        holder = self._model.holder
        holder.step = inputs.step(tables)
        try:
            model = self._model
            return forward(model, inputs.ids, inputs.positions, inputs.sample_rows).logits
        finally:
            holder.step = None


def _sample_row(item: Scheduled) -> SampleRow:
    sequence = item.sequence
    tokens, prompt = sequence.tokens, sequence.prompt_length
    return SampleRow(
        params=sequence.sampling,
        position=len(tokens),
        prompt=Window(tokens, 0, prompt),
        output=Window(tokens, prompt, len(tokens)),
    )
