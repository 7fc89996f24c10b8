"""Least bytes and operations of each kernel, which no implementation can go below.

Weights count once a call for each distinct adapter, as if every row of the batch could share one
read; inputs and outputs once a kernel. All in 16 bits, except the low-rank partial sums (float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_kernels.roofline.machine import GpuRates, Linear, Model

VALUE = 2  # bytes
PARTIAL = 4  # bytes of a partial sum


@dataclass(frozen=True)
class KernelWork:
    """Bytes and operations of one kernel."""

    bytes: float
    operations: float

    def __add__(self, other: KernelWork) -> KernelWork:
        return KernelWork(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, machine: GpuRates) -> float:
        """The least time that the work takes."""
        return machine.floor(self.bytes, self.operations)


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step and the adapters that they are spread over evenly."""

    rows: int
    adapters: int
    rank: int


def linear(group: Linear, rows: int) -> KernelWork:
    """The base model's own product."""
    outputs = sum(group.outputs)
    moved = group.inputs * outputs + rows * (group.inputs + outputs)
    return KernelWork(VALUE * moved, 2 * rows * group.inputs * outputs)


def shrink(group: Linear, batch: StepBatch, parts: int = 1) -> KernelWork:
    """h = A x for every update of the group. parts: those in which features are summed."""
    ranks = batch.rank * len(group.outputs)
    weights = VALUE * batch.adapters * ranks * group.inputs
    rows = batch.rows * (VALUE * group.inputs + PARTIAL * parts * ranks)
    return KernelWork(weights + rows, 2 * batch.rows * ranks * group.inputs)


def expand(group: Linear, batch: StepBatch, parts: int = 1) -> KernelWork:
    """y += B h, y read and written."""
    outputs, ranks = sum(group.outputs), batch.rank * len(group.outputs)
    weights = VALUE * batch.adapters * batch.rank * outputs
    rows = batch.rows * (2 * VALUE * outputs + PARTIAL * parts * ranks)
    return KernelWork(weights + rows, 2 * batch.rows * batch.rank * outputs)


def attention(model: Model, rows: int, context: int) -> KernelWork:
    """Decoding: one query a sequence over `context` keys."""
    keys = rows * context * 2 * model.kv_heads * model.head_size
    queries = rows * 2 * model.heads * model.head_size
    operations = 4 * rows * context * model.heads * model.head_size
    return KernelWork(VALUE * (keys + queries), operations)


def kv_write(model: Model, rows: int) -> KernelWork:
    """Read and write each row's keys and values."""
    return KernelWork(2 * VALUE * rows * 2 * model.kv_heads * model.head_size, 0)


def turbo_heads(model: Model, rows: int, adapters: int, heads: int) -> KernelWork:
    """hᵢ = x + SiLU(Wᵢ x + bᵢ), W square: once a step, for every adapter that has heads."""
    weights = adapters * heads * model.hidden * model.hidden
    values = rows * (1 + heads) * model.hidden
    return KernelWork(VALUE * (weights + values), 2 * rows * heads * model.hidden * model.hidden)


def sample(model: Model, rows: int) -> KernelWork:
    """One read of the logits."""
    return KernelWork(VALUE * rows * model.vocabulary, 0)
