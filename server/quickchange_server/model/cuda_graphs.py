"""Captures computations as CUDA graphs. Imported on CUDA devices alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quickchange_server.model.graphs import Outputs

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
