"""The loss of reference answers under the base with an adapter, by the engine's own forward pass.

Whatever adapter the engine serves can be scored so, in one pass over each example and without
sampling. Heads that draft change no loss and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quickchange_server.adapters.batch_segments import Run, segments
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.config import Settings
from quickchange_server.engine.engine import torch_dtype
from quickchange_server.model import paged_attention
from quickchange_server.model.forward_context import AdapterBatch, AttentionBatch, ForwardContext
from quickchange_server.model.model_loader import LoadedModel, forward, load_model
from quickchange_server.model.paged_attention import PagedAttention
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_training.examples import Encoded

_BLOCK = 16  # tokens
_ROWS = 512  # of one pass, where no example alone has more


class LossMeter:
    """The base model, with room for one adapter at a time. Raises what `load_model` raises."""

    def __init__(self, settings: Settings) -> None:
        self._device = torch.device(settings.device)
        self._dtype = torch_dtype(settings.dtype)
        self._model: LoadedModel = load_model(
            settings.model,
            dtype=self._dtype,
            device=self._device,
            adapters=True,
            quantization=settings.quantization,
        )
        self._adapter_dtype = torch_dtype(settings.held_adapter_dtype)
        self._pool = DevicePool(
            self._model.groups, settings.adapter_device_bytes, self._adapter_dtype, self._device
        )

    def loss(self, adapter: CanonicalAdapter | None, examples: Sequence[Encoded]) -> float:
        """Nats a token of all answers, their end-of-sequence included.

        Raises AdapterFailedError for an adapter of another base, or larger than
        `adapter_device_bytes`.
        """
        if adapter is None or not adapter.updates:
            return self._mean(examples, None)
        shapes = page_shapes(self._model.groups, self._adapter_dtype)
        image = build_image(replace(adapter, turbo=None), shapes, self._adapter_dtype)
        slot = self._pool.allocate(image)
        assert slot is not None, "the pool holds nothing else"
        try:
            self._pool.write(slot, image)
            self._pool.publish(slot)
            return self._mean(examples, slot)
        finally:
            self._pool.free(slot)

    def _mean(self, examples: Sequence[Encoded], slot: int | None) -> float:
        groups = _groups(examples)
        blocks = max(sum(_blocks_of(e) for e in group) for group in groups)
        cache = PagedAttention(
            self._model.layers, blocks, _BLOCK, self._dtype, self._device, self._model.holder
        )
        paged_attention.install(self._model.module, cache)
        nats = sum(self._nats(group, slot) for group in groups)
        return nats / sum(e.answer_length for e in examples)

    def _nats(self, group: Sequence[Encoded], slot: int | None) -> float:
        """Negative log-likelihood of all answer tokens of one pass."""
        ids = torch.tensor([token for e in group for token in e.tokens])  # [T]
        positions = torch.tensor([p for e in group for p in range(len(e.tokens))])
        rows, targets = _answer_rows(group)
        logits = self._logits(group, ids, positions, rows, slot)  # [R, V]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        found = logprobs.gather(1, targets.to(logprobs.device)[:, None])
        return -float(found.sum(dtype=torch.float64))

    def _logits(
        self,
        group: Sequence[Encoded],
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        slot: int | None,
    ) -> Tensor:
        adapters = None
        if slot is not None:
            runs = [Run(count, ((slot, 1.0),)) for count in (len(ids), len(rows))]
            both = [segments([run], self._device) for run in runs]
            adapters = AdapterBatch(self._pool.tables, *both)
        holder = self._model.holder
        holder.step = ForwardContext(_attention_batch(group, self._device), adapters)
        try:
            return forward(self._model, ids, positions, rows).logits
        finally:
            holder.step = None


def _blocks_of(example: Encoded) -> int:
    return -(-len(example.tokens) // _BLOCK)


def _groups(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    """Examples of one pass together: _ROWS tokens at most, or one example."""
    groups: list[list[Encoded]] = []
    rows = 0
    for example in examples:
        rows += len(example.tokens)
        if not groups or rows > _ROWS:
            groups.append([])
            rows = len(example.tokens)
        groups[-1].append(example)
    return groups


def _answer_rows(group: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """int64 [R] each: the rows whose logits predict an answer token, and these tokens."""
    rows: list[int] = []
    targets: list[int] = []
    begin = 0
    for example in group:
        rows += range(begin + example.prompt_length - 1, begin + len(example.tokens) - 1)
        targets += example.tokens[example.prompt_length :]
        begin += len(example.tokens)
    return torch.tensor(rows), torch.tensor(targets)


def _attention_batch(group: Sequence[Encoded], device: torch.device) -> AttentionBatch:
    """Each example a sequence of its own, in blocks of its own."""
    counts = [_blocks_of(e) for e in group]
    tables = torch.zeros(len(group), max(counts), dtype=torch.int32)
    slots: list[int] = []
    first = 0
    for row, (example, count) in enumerate(zip(group, counts, strict=True)):
        tables[row, :count] = torch.arange(first, first + count)
        slots += range(first * _BLOCK, first * _BLOCK + len(example.tokens))
        first += count
    lengths = torch.tensor([len(e.tokens) for e in group], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    return AttentionBatch(
        slots=torch.tensor(slots).to(device),
        block_tables=tables.to(device),
        seq_lens=lengths.to(device),
        query_start=starts.to(device),
    )
