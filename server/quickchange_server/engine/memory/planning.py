"""What an engine would take of a device, worked out without one: base, caches and arena exactly.

Graphs and scratch are estimates, from the largest tensors of a step; an engine measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quickchange_kernels.attention.paged_attention_tuning import scratch_bytes
from quickchange_server.adapters.arena_sizes import ArenaSizes
from quickchange_server.config import GIB, Settings
from quickchange_server.engine.inputs.step_shapes import bucket_sizes
from quickchange_server.engine.memory.budget import MIB, Parts, kv_bytes, memory_table, size
from quickchange_server.engine.memory.cache_sizes import CacheSizes, cache_sizes, graph_rows
from quickchange_server.engine.memory.footprint import (
    adapter_pages,
    arena_bytes,
    held_dtype,
    memory_lines,
    pages_bytes,
    tensor_bytes,
    wish_of,
)
from quickchange_server.model.loading.model_dtype import dtype_name
from quickchange_server.model.loading.model_outline import Outline

_RUNTIME = 600 * MIB  # a process's own on a GPU: context, libraries, kernels, workspaces
_GRAPH_NODES = 2 * MIB  # launches of one captured graph
_MODULE_WIDTHS = 8  # tensors of the hidden size that live at once in a layer


@dataclass(frozen=True)
class MemoryPlan:
    """An engine's memory before it is started."""

    base: int
    arena: int
    caches: CacheSizes
    text: str


def memory_plan(
    planned: Outline, settings: Settings, total: int | None, ranks: Sequence[int], disk: int
) -> MemoryPlan:
    """The plan for a device of `total` bytes; None: a CPU. disk: bytes that are free for adapters.

    Raises SettingError, with what would fit, where the engine would.
    """
    model = planned.model
    base = tensor_bytes(model.module) if planned.stored_bytes is None else planned.stored_bytes
    parts = None
    if total is not None:
        parts = Parts(total, settings.gpu_memory_utilization, base + _RUNTIME, 0, 0, 0)
    arena = 0
    if settings.adapters:
        arena = arena_bytes(model, settings, None if parts is None else parts.left)
    if parts is None:
        budget = GIB if settings.kv_cache_bytes is None else settings.kv_cache_bytes
    else:
        tables = _table_bytes(planned, settings, arena)
        graphs, scratch = _graphs(planned, settings), _scratch(planned, settings)
        parts = replace(parts, adapters=arena + tables, graphs=graphs, scratch=scratch)
        budget = kv_bytes(parts, wish_of(model, settings))
    caches = cache_sizes(model, settings, budget)
    lines = memory_lines(model, settings, arena, caches, parts)
    if planned.stored_bytes is not None:
        note = f"weights {size(base)} as stored by {planned.stored_by}"
        lines[0] = replace(lines[0], bytes=base if parts is None else parts.base, note=note)
    text = memory_table(lines, "" if parts is None else parts.says)
    if parts is not None:
        text += "\n  Graphs and scratch are estimates; an engine measures them when it starts."
    if arena:
        text += "\n\n" + _adapters_table(planned, settings, arena, ranks, disk)
    return MemoryPlan(base, arena, caches, text)


def _adapters_table(
    planned: Outline, settings: Settings, arena: int, ranks: Sequence[int], disk: int
) -> str:
    """Number of adapters of each rank on all linears that fit on each tier."""
    model, dtype = planned.model, held_dtype(planned.model, settings)
    room = ArenaSizes.of(model.groups, arena, dtype)
    lines = [
        f"Adapters on all linears, in {dtype_name(dtype)}: how many fit",
        f"  {'rank':>6}  {'each':>10}  {'device':>8}  {'host':>8}  {'disk':>8}",
    ]
    for rank in ranks:
        pages = adapter_pages(model, dtype, rank)
        each = max(pages_bytes(pages, dtype), 1)
        host = settings.adapter_host_bytes // each
        lines.append(
            f"  {rank:>6}  {size(each):>10}  {room.room_for(pages):>8}  {host:>8}  "
            f"{disk // each:>8}"
        )
    tiers = f"{size(arena)} (adapter_device_bytes), {size(settings.adapter_host_bytes)}"
    lines.append(f"  of {tiers} (adapter_host_bytes), {size(disk)} free")
    return "\n".join(lines)


def _table_bytes(planned: Outline, settings: Settings, arena: int) -> int:
    if not arena:
        return 0
    dtype = held_dtype(planned.model, settings)
    return ArenaSizes.of(planned.model.groups, arena, dtype).table_bytes


def _row_bytes(planned: Outline) -> int:
    """Bytes of one row's largest tensors in a layer."""
    model = planned.model
    widest = max(
        [g.out_features for g in model.groups if g.out_features < model.vocabulary],
        default=4 * model.hidden,
    )
    return (_MODULE_WIDTHS * model.hidden + 2 * widest) * model.dtype.itemsize


def _graphs(planned: Outline, settings: Settings) -> int:
    """Outputs of the largest graph, what lives while it runs, and inputs and launches of all."""
    model, most = planned.model, graph_rows(settings)
    sizes = bucket_sizes(most)
    length = settings.max_model_len or model.max_positions
    blocks = -(-length // settings.block_size)
    logits = (model.vocabulary + model.hidden) * model.dtype.itemsize
    sets = 2 if settings.adapters else 1
    return (
        most * (2 * logits + _row_bytes(planned))
        + _attention(planned, most, most, length)
        + sets * sum(sizes) * (4 * blocks + 128)
        + sets * len(sizes) * _GRAPH_NODES
    )


def _scratch(planned: Outline, settings: Settings) -> int:
    """The largest prefill, all of whose rows are scored, and the sampler."""
    model = planned.model
    logits = model.vocabulary * model.dtype.itemsize
    drawn = graph_rows(settings) * model.vocabulary * 3 * torch.float32.itemsize
    scored = 2 * min(256, settings.batch_tokens) * model.vocabulary * torch.float32.itemsize
    rows, sequences = settings.batch_tokens, settings.step_sequences
    length = settings.max_model_len or model.max_positions
    attention = _attention(planned, rows, sequences, length)
    return rows * (logits + _row_bytes(planned)) + max(drawn, scored, attention)


def _attention(planned: Outline, rows: int, sequences: int, length: int) -> int:
    """Partial results of one layer's attention."""
    return max(
        (
            scratch_bytes(rows, sequences, planned.heads, s.kv_heads, s.value_size, length)
            for s in planned.model.layers.values()
        ),
        default=0,
    )
