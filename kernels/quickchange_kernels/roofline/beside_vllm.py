"""A decode step with adapters, here and in vLLM, on paper: the same bytes, other launches.

Both read the same weights, keys and values. What differs is counted: launches a layer and a step,
and which of them start behind the one before without a gap. Host work is left out of both: it is
hidden behind the step here by the overlap, and in vLLM by its asynchronous scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_kernels.roofline import floors
from quickchange_kernels.roofline.floors import StepBatch
from quickchange_kernels.roofline.machine import GpuRates, Model

LINEARS_SHARE = 0.85  # of the bandwidth, that cuBLAS reaches with few rows: an assumption
UPDATES_SHARE = 0.6  # of the bandwidth, that low-rank kernels reach: an assumption
OVERLAPPED = 1.0e-6  # s between a kernel and one that has started behind it: an assumption


@dataclass(frozen=True)
class ServingSystem:
    """Launches of a decode step with adapters on all linears."""

    name: str
    layer: int
    once: int
    overlapped: int  # of a layer's, that start while the one before runs
    attention_share: float  # of the bandwidth, that attention reaches: an assumption


# Counted by tests/engine/test_launches_a_layer.py on a Llama: 4 linears, 4 shrink, 4 expand, 2
# norms, rotary, kv_write, attention, its merge and the gate; once a step the sampler's 4, the last
# norm, the head and its updates, the embedding and its updates, and some 16 of torch's.
QUICKCHANGE = ServingSystem("Quickchange", 19, 26, 4, 0.75)
QUICKCHANGE_DEPENDENT_OFF = ServingSystem("without dependent launches", 19, 26, 0, 0.75)
# Read from its source in November 2026: 4 linears, 2 norms, rotary, cache write, attention and the
# gate; for each of 4 groups a fill with zeros, a shrink and an expand, none of them dependent.
VLLM = ServingSystem("vLLM", 22, 26, 0, 0.85)


def step_seconds(
    system: ServingSystem, model: Model, batch: StepBatch, context: int, machine: GpuRates
) -> tuple[float, float, float, float]:
    """(linears and head, attention, updates, gaps between launches) of a step, in seconds."""
    layer = sum(floors.linear(group, batch.rows).seconds(machine) for group in model.linears)
    base = model.layers * layer + floors.linear(model.head, batch.rows).seconds(machine)
    attention = model.layers * floors.attention(model, batch.rows, context).seconds(machine)
    updates = model.layers * sum(
        work(group, batch).seconds(machine)
        for group in model.linears
        for work in (floors.shrink, floors.expand)
    )
    overlapped = model.layers * system.overlapped
    launches = model.layers * system.layer + system.once - overlapped
    return (
        base / LINEARS_SHARE,
        attention / system.attention_share,
        updates / UPDATES_SHARE,
        launches * machine.launch + overlapped * OVERLAPPED,
    )
