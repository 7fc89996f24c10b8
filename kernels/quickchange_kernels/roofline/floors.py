"""Least bytes and operations of each kernel, which no implementation can go below.

Weights count once a call for each distinct adapter, as if every row of the batch could share one
read; inputs and outputs once a kernel. By default all are in 16 bits, except the low-rank partial
sums (float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_kernels.roofline.machine import Linear, MachineRates, Model

VALUE = 2  # bytes
PARTIAL = 4  # bytes of a partial sum


@dataclass(frozen=True)
class ValueBytes:
    """Bytes that one value costs the memory; 0 for what stays in the caches."""

    stored: float = VALUE  # weights, adapters, keys and values
    passed: float = VALUE  # what one kernel writes and another reads
    partial: float = PARTIAL  # partial sums between the halves of a low-rank update


SIXTEEN_BITS = ValueBytes()


@dataclass(frozen=True)
class KernelWork:
    """Bytes and operations of one kernel."""

    bytes: float
    operations: float

    def __add__(self, other: KernelWork) -> KernelWork:
        return KernelWork(self.bytes + other.bytes, self.operations + other.operations)

    def __mul__(self, times: float) -> KernelWork:
        return KernelWork(self.bytes * times, self.operations * times)

    def seconds(self, machine: MachineRates) -> float:
        """The least time that the work takes."""
        return machine.floor(self.bytes, self.operations)


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step and the adapters that they are spread over evenly."""

    rows: int
    adapters: int
    rank: int


def linear(group: Linear, rows: int, value: ValueBytes = SIXTEEN_BITS) -> KernelWork:
    """The base model's own product."""
    outputs = sum(group.outputs)
    moved = value.stored * group.inputs * outputs + value.passed * rows * (group.inputs + outputs)
    return KernelWork(moved, 2 * rows * group.inputs * outputs)


def shrink(
    group: Linear, batch: StepBatch, parts: int = 1, value: ValueBytes = SIXTEEN_BITS
) -> KernelWork:
    """h = A x for every update of the group. parts: those in which features are summed."""
    ranks = batch.rank * len(group.outputs)
    weights = value.stored * batch.adapters * ranks * group.inputs
    rows = batch.rows * (value.passed * group.inputs + value.partial * parts * ranks)
    return KernelWork(weights + rows, 2 * batch.rows * ranks * group.inputs)


def expand(
    group: Linear, batch: StepBatch, parts: int = 1, value: ValueBytes = SIXTEEN_BITS
) -> KernelWork:
    """y += B h, y read and written."""
    outputs, ranks = sum(group.outputs), batch.rank * len(group.outputs)
    weights = value.stored * batch.adapters * batch.rank * outputs
    rows = batch.rows * (2 * value.passed * outputs + value.partial * parts * ranks)
    return KernelWork(weights + rows, 2 * batch.rows * batch.rank * outputs)


def attention(
    model: Model, rows: int, context: float, value: ValueBytes = SIXTEEN_BITS
) -> KernelWork:
    """Decoding: one query a sequence over `context` keys."""
    keys = rows * context * 2 * model.kv_heads * model.head_size
    queries = rows * 2 * model.heads * model.head_size
    operations = 4 * rows * context * model.heads * model.head_size
    return KernelWork(value.stored * keys + value.passed * queries, operations)


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
