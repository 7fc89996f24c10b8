"""Captured graphs of forward passes of fixed shape: replayed without Python or launches in between.

`Graphs` does the bookkeeping: the graph of each shape, its inputs in memory that stays, and when a
graph is out of date. Its `Capture` is given from outside: on CUDA devices `CudaCapture`.
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
Other = TypeVar("Other")

Outputs = tuple[Tensor, ...]

# Runs a computation; returns a function that runs it again on the same memory, and its outputs.
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


@dataclass(frozen=True)
class _Graph:
    tables: LowRankTables | None
    replay: Callable[[], None]
    outputs: Outputs


class Graphs(Generic[Inputs]):
    """One graph per key, captured when it is first run.

    compute: makes the outputs from inputs on the device and the adapters' tables. It must not read
    the tensors' values on the host. carried: what it reads of the run before and writes for the
    next. A capture computes too, so it is made on blank inputs, and leaves `carried` as it was.
    """

    def __init__(
        self,
        compute: Callable[[Inputs, LowRankTables | None], Outputs],
        capture: Capture,
        device: torch.device,
        carried: Tensor | None = None,
    ) -> None:
        self._compute = compute
        self._carried = carried
        self._capture = capture
        self._device = device
        self._inputs: dict[Hashable, StaticInputs[Inputs]] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self._outputs: list[Tensor] = []  # memory that all graphs write their outputs to
        self.captures = 0  # so far

    def inputs(self, key: Hashable, make: Callable[[], Inputs]) -> Inputs:
        """The key's inputs on the host, to be written into before each run. make: the first ones,
        whose shapes stay."""
        if key not in self._inputs:
            self._inputs[key] = StaticInputs(make(), self._device)
        return self._inputs[key].host

    def keep_blank(self, key: Hashable) -> None:
        """Keep what the key's inputs hold now as a step that changes nothing."""
        self._inputs[key].keep_blank()

    def device_inputs(self, key: Hashable) -> Inputs:
        """The key's inputs on the device."""
        return self._inputs[key].device

    def run(
        self, key: Hashable, tables: LowRankTables | None, others: Other
    ) -> tuple[Outputs, Other]:
        """The outputs for the key's inputs as they are now, and `others` on the device, which go up
        with them.

        The outputs lie in the graphs' memory: the next `run`, of any key, may overwrite them.
        """
        static = self._inputs[key]
        arrived = static.send(others)
        graph = self._graphs.get(key)
        if graph is None or not _same_memory(graph.tables, tables):
            with static.blank():
                graph = self._captured(static.device, tables)
        elif graph.tables is not tables:
            # Equal tables may be another object: kept, so that the next comparison is cheap.
            graph = dataclasses.replace(graph, tables=tables)
        self._graphs[key] = graph
        graph.replay()
        return graph.outputs, arrived

    def _captured(self, inputs: Inputs, tables: LowRankTables | None) -> _Graph:
        self.captures += 1
        before = None if self._carried is None else self._carried.clone()
        replay, outputs = self._capture(lambda: self._kept(self._compute(inputs, tables)))
        if self._carried is not None and before is not None:
            with torch.inference_mode():
                self._carried.copy_(before)
        return _Graph(tables, replay, outputs)

    @torch.inference_mode()
    def _kept(self, outputs: Outputs) -> Outputs:
        """The outputs in memory that all graphs share: only one's are in use at a time."""
        kept: list[Tensor] = []
        for place, output in enumerate(outputs):
            if place == len(self._outputs):
                self._outputs.append(output.new_empty(0))
            if self._outputs[place].numel() < output.numel():
                self._outputs[place] = output.new_empty(output.numel())
            kept.append(self._outputs[place][: output.numel()].view(output.shape).copy_(output))
        return tuple(kept)


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


def computed_once(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """The capture on a GPU that is not there: what would be captured is launched, so compiled.

    Graphs share their outputs' memory, so a replay leaves there what the capture left.
    """
    outputs = compute()
    left = [output.clone() for output in outputs]

    @torch.inference_mode()
    def replay() -> None:
        for output, value in zip(outputs, left, strict=True):
            output.copy_(value)

    return replay, outputs
