"""Captures computations as CUDA graphs. Imported on CUDA devices alone.

Forward passes of fixed shape, captured once and replayed: no Python and no launches in between.

Knows the bookkeeping alone: which graph serves which shape, its inputs on memory that stays, when
one is out of date. What capturing means is given from outside: on CUDA it is a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.model.input_buffers import StaticInputs

Inputs = TypeVar("Inputs")

Outputs = tuple[Tensor, ...]

# Runs a computation, and returns what runs the same again on the same memory, and its outputs
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def capture_for(device: torch.device) -> Capture | None:
    """How computations are captured on a device; None where each step runs as it comes."""
    if device.type != "cuda":
        return None
    from quickchange_server.model.cuda_graphs import CudaCapture

    return CudaCapture(device)


@dataclass(frozen=True)
class _Graph(Generic[Inputs]):
    inputs: StaticInputs[Inputs]
    tables: LowRankTables | None
    replay: Callable[[], None]
    outputs: Outputs


class Graphs(Generic[Inputs]):
    """One graph a key, captured when it is first needed.

    compute: from inputs on the device, and the adapters' tables, to the outputs. It must not look
    at the tensors' values on the host.
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

    def run(self, key: Hashable, inputs: Inputs, tables: LowRankTables | None) -> Outputs:
        """The outputs for host `inputs`, which must have the same shapes for the same key.

        They lie in the graph's memory: the next `run`, of any key, may overwrite them.
        """
        graph = self._graphs.get(key)
        if graph is None or not _same_memory(graph.tables, tables):
            graph = self._captured(inputs, tables)
        else:
            # Equal tables, another object: remembered, so that the next comparison is cheap.
            graph = dataclasses.replace(graph, tables=tables)
            graph.inputs.refill(inputs)
        self._graphs[key] = graph
        graph.replay()
        return graph.outputs

    def _captured(self, inputs: Inputs, tables: LowRankTables | None) -> _Graph[Inputs]:
        static = StaticInputs(inputs, self._device)
        on_device = static.tree()
        replay, outputs = self._capture(lambda: self._compute(on_device, tables))
        return _Graph(static, tables, replay, outputs)


def _same_memory(captured: LowRankTables | None, now: LowRankTables | None) -> bool:
    """Whether a graph that reads the one reads the other: the same tensors, all else equal."""
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


_RUNS_BEFORE = 2  # the first compiles kernels and makes cuBLAS's workspaces, which no capture may


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
            # Of this thread alone: the loader's thread may take pinned memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = compute()
        return graph.replay, outputs
