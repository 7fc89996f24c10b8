"""Bytes and operations of each kernel: what no implementation can go below.

Weights count once a call for each distinct adapter, as if every row of the batch could share one
read; inputs and outputs once a kernel. All in 16 bits, except the low-rank partial sums (float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_kernels.roofline.machine import Linear, Machine, Model

VALUE = 2  # bytes
PARTIAL = 4  # bytes of a partial sum


@dataclass(frozen=True)
class Work:
    """What one kernel must do."""

    bytes: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, machine: Machine) -> float:
        """Its floor."""
        return machine.floor(self.bytes, self.operations)


@dataclass(frozen=True)
class Batch:
    """The rows of a step and the adapters that they are spread over evenly."""

    rows: int
    adapters: int
    rank: int


def linear(group: Linear, rows: int) -> Work:
    """The base model's own product."""
    outputs = sum(group.outputs)
    moved = group.inputs * outputs + rows * (group.inputs + outputs)
    return Work(VALUE * moved, 2 * rows * group.inputs * outputs)


def shrink(group: Linear, batch: Batch, parts: int = 1) -> Work:
    """h = A x for every update of the group. parts: in which the features are summed apart."""
    ranks = batch.rank * len(group.outputs)
    weights = VALUE * batch.adapters * ranks * group.inputs
    rows = batch.rows * (VALUE * group.inputs + PARTIAL * parts * ranks)
    return Work(weights + rows, 2 * batch.rows * ranks * group.inputs)


def expand(group: Linear, batch: Batch, parts: int = 1) -> Work:
    """y += B h, y read and written."""
    outputs, ranks = sum(group.outputs), batch.rank * len(group.outputs)
    weights = VALUE * batch.adapters * batch.rank * outputs
    rows = batch.rows * (2 * VALUE * outputs + PARTIAL * parts * ranks)
    return Work(weights + rows, 2 * batch.rows * batch.rank * outputs)


def attention(model: Model, rows: int, context: int) -> Work:
    """Decoding: one query a sequence over `context` keys."""
    keys = rows * context * 2 * model.kv_heads * model.head_size
    queries = rows * 2 * model.heads * model.head_size
    operations = 4 * rows * context * model.heads * model.head_size
    return Work(VALUE * (keys + queries), operations)


def kv_write(model: Model, rows: int) -> Work:
    """Read and write each row's keys and values."""
    return Work(2 * VALUE * rows * 2 * model.kv_heads * model.head_size, 0)


def turbo_heads(model: Model, rows: int, adapters: int, heads: int) -> Work:
    """hᵢ = x + SiLU(Wᵢ x + bᵢ), W square: once a step, for every adapter that has heads."""
    weights = adapters * heads * model.hidden * model.hidden
    values = rows * (1 + heads) * model.hidden
    return Work(VALUE * (weights + values), 2 * rows * heads * model.hidden * model.hidden)


def sample(model: Model, rows: int) -> Work:
    """One read of the logits."""
    return Work(VALUE * rows * model.vocabulary, 0)
