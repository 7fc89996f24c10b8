"""The most tokens a second that a machine can serve of a workload, whoever serves it.

A closed loop: each request's prompt is computed, then it takes part in one step after another. A
step lasts as long as its bytes take to read (weights once, each distinct adapter once, keys and
values) or its products to compute, whichever is longer; a prompt lasts as long as its products.
What passes between operations stays in the caches. A server that computes prompts while it waits
for a step's bytes can come above this by that much, where steps are bound by the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_kernels.roofline import floors
from quickchange_kernels.roofline.floors import KernelWork, StepBatch, ValueBytes
from quickchange_kernels.roofline.machine import MachineRates, Model


@dataclass(frozen=True)
class Precision:
    """Widths of what is stored, in bytes a value, and the operands that are multiplied."""

    weights: float  # of the base's linears
    head: float  # of its LM head
    operands: str
    rest: float  # adapters, keys and values
    rest_operands: str


PRECISIONS = {
    "float32": Precision(4, 4, "float32", 4, "float32"),
    "bfloat16": Precision(2, 2, "bfloat16", 2, "bfloat16"),
    "int8": Precision(
        1 + 2 / 32, 1 + 2 / 32, "int8", 2, "bfloat16"
    ),  # a 16-bit scale for each 32 weights
    "int4": Precision(1 / 2 + 4 / 32, 1 + 2 / 32, "int8", 2, "bfloat16"),  # and a minimum
}


@dataclass(frozen=True)
class ClosedLoop:
    """Requests that are always `concurrent` at once, each under the next of `adapters` adapters."""

    concurrent: int
    prompt: int  # tokens
    answer: int  # tokens
    adapters: int = 0  # distinct; 0: none
    rank: int = 16

    @property
    def batch(self) -> StepBatch:
        """A decode step's rows and the adapters among them."""
        return StepBatch(self.concurrent, min(self.adapters, self.concurrent), self.rank)

    @property
    def context(self) -> float:
        """Keys that a decode step's row sees, on average."""
        return self.prompt + self.answer / 2


@dataclass(frozen=True)
class WorkloadLimit:
    """A workload's limit, and what it is made of; times in seconds."""

    step_bytes: float
    step_reading: float
    step_arithmetic: float
    prompt_arithmetic: float  # of one prompt
    tokens_per_second: float


def step_work(
    model: Model, precision: Precision, batch: StepBatch, context: float
) -> tuple[KernelWork, KernelWork]:
    """Work of a step over `context` keys a row: in the weights' operands, and in the rest's."""
    weights, rest = _stored(precision.weights), _stored(precision.rest)
    layer = sum((floors.linear(g, batch.rows, weights) for g in model.linears), KernelWork(0, 0))
    base = layer * model.layers + floors.linear(model.head, batch.rows, _stored(precision.head))
    attention = floors.attention(model, batch.rows, context, rest)
    return base, (attention + _update(model, batch, rest)) * model.layers


def prompt_work(
    model: Model, precision: Precision, tokens: int, rank: int
) -> tuple[KernelWork, KernelWork]:
    """Work of a prompt's products, as `step_work`: no bytes, and the LM head once. rank 0: none."""
    layer = sum((floors.linear(g, tokens) for g in model.linears), KernelWork(0, 0))
    base = layer * model.layers + floors.linear(model.head, 1)
    rest = floors.attention(model, tokens, (tokens + 1) / 2)  # causal
    if rank:
        rest += _update(model, StepBatch(tokens, 1, rank), _stored(precision.rest))
    rest *= model.layers
    return KernelWork(0, base.operations), KernelWork(0, rest.operations)


def workload_limit(
    machine: MachineRates, model: Model, precision: Precision, load: ClosedLoop
) -> WorkloadLimit:
    """The limit of a closed loop."""
    base, rest = step_work(model, precision, load.batch, load.context)
    reading = (base.bytes + rest.bytes) / machine.bandwidth
    arithmetic = _arithmetic(machine, precision, base, rest)
    rank = load.rank if load.adapters else 0
    prompt = _arithmetic(machine, precision, *prompt_work(model, precision, load.prompt, rank))
    # a prompt's last row gives the first token
    seconds = (load.answer - 1) * max(reading, arithmetic) + load.concurrent * prompt
    return WorkloadLimit(
        step_bytes=base.bytes + rest.bytes,
        step_reading=reading,
        step_arithmetic=arithmetic,
        prompt_arithmetic=prompt,
        tokens_per_second=load.concurrent * load.answer / seconds,
    )


def _stored(width: float) -> ValueBytes:
    return ValueBytes(stored=width, passed=0, partial=0)


def _update(model: Model, batch: StepBatch, value: ValueBytes) -> KernelWork:
    """Low-rank updates of all linears of a layer; adapters 0: none."""
    if not batch.adapters:
        return KernelWork(0, 0)
    halves = (
        half(group, batch, value=value)
        for group in model.linears
        for half in (floors.shrink, floors.expand)
    )
    return sum(halves, KernelWork(0, 0))


def _arithmetic(
    machine: MachineRates, precision: Precision, base: KernelWork, rest: KernelWork
) -> float:
    rates = machine.operations
    return (
        base.operations / rates[precision.operands]
        + rest.operations / rates[precision.rest_operands]
    )
