"""Captured graphs of forward passes of fixed shape: replayed without Python or launches in between.

`Graphs` does the bookkeeping: the graph of each shape, its inputs in memory that stays, and when a
graph is out of date. Its `Capture` is given from outside: on CUDA devices `CudaCapture`.

Outputs of all graphs lie in one place, as large as those of the largest: 54 graphs of Llama 3.1 8B,
for up to 512 rows, would keep 2.4 GB of logits otherwise. A copy of a graph's logits costs it a
thousandth of what the weights do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import gt
from typing import Generic, TypeVar

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.model.input_buffers import StaticInputs

Inputs = TypeVar("Inputs")

Outputs = tuple[Tensor, ...]

# Runs a computation; returns a function that runs it again on the same memory, and its outputs.
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


@dataclass(frozen=True)
class _Graph(Generic[Inputs]):
    inputs: StaticInputs[Inputs]
    tables: LowRankTables | None
    replay: Callable[[], None]
    outputs: Outputs


class Graphs(Generic[Inputs]):
    """One graph per key, captured when it is first needed.

    compute: makes the outputs from inputs on the device and the adapters' tables. It must not read
    the tensors' values on the host.
    """

    def __init__(
        self,
        compute: Callable[[Inputs, LowRankTables | None], Outputs],
        capture: Capture,
        device: torch.device,
    ) -> None:
        self._compute = compute
        self._capture = capture
        self._device = device
        self._graphs: dict[Hashable, _Graph[Inputs]] = {}
        self._outputs: Outputs = ()  # of the largest graph; the others' are their first rows
        self.captures = 0  # so far

    def run(self, key: Hashable, inputs: Inputs, tables: LowRankTables | None) -> Outputs:
        """The outputs for host `inputs`, which must have the same shapes for the same key.

        They lie in the graph's memory: the next `run`, of any key, may overwrite them.
        """
        graph = self._graphs.get(key)
        if graph is None or not _same_memory(graph.tables, tables):
            graph = self._captured(inputs, tables)
        else:
            # Equal tables may be another object: kept, so that the next comparison is cheap.
            graph = dataclasses.replace(graph, tables=tables)
            graph.inputs.refill(inputs)
        self._graphs[key] = graph
        graph.replay()
        return graph.outputs

    def _captured(self, inputs: Inputs, tables: LowRankTables | None) -> _Graph[Inputs]:
        self.captures += 1
        static = StaticInputs(inputs, self._device)
        on_device = static.tree()
        replay, outputs = self._capture(lambda: self._kept(self._compute(on_device, tables)))
        return _Graph(static, tables, replay, outputs)

    def _kept(self, outputs: Outputs) -> Outputs:
        """The outputs, copied to where all graphs have theirs.

        The place is made when the largest graph first computes, which is before it is captured:
        graphs are captured largest first.
        """
        rows = [output.shape[0] for output in outputs]
        if not self._outputs or any(map(gt, rows, [held.shape[0] for held in self._outputs])):
            self._outputs = tuple(torch.empty_like(output) for output in outputs)
        kept = tuple(
            held[: output.shape[0]] for held, output in zip(self._outputs, outputs, strict=True)
        )
        for held, output in zip(kept, outputs, strict=True):
            held.copy_(output)
        return kept


def _same_memory(captured: LowRankTables | None, now: LowRankTables | None) -> bool:
    """True if both tables have the same tensors and are equal in all else."""
    if captured is now:
        return True
    if captured is None or now is None:
        return False
    pairs = [
        (getattr(captured, field.name), getattr(now, field.name))
        for field in dataclasses.fields(LowRankTables)
    ]
    return all(
        one is other if isinstance(one, Tensor) else bool(one == other) for one, other in pairs
    )


_RUNS_BEFORE = 2  # they compile kernels and make cuBLAS's workspaces, which no capture may


class CudaCapture:
    """A `Capture` whose graphs share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(_RUNS_BEFORE):
                    compute()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Capture this thread alone: the loader's may take pinned memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = compute()
        return graph.replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    """The capture that suits a device; None if every step runs eagerly."""
    return CudaCapture(device) if device.type == "cuda" else None
