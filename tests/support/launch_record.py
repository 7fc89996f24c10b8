"""Stands in for a GPU: the launchers run, each launch is noted, none is compiled or run.

Inside `recorded_launches` CPU tensors are served as on a GPU of the given kind (`absent_gpu.py`).
Each launch goes through Triton's own binder, so that its key is what Triton would compile for.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from quickchange_kernels.absent_gpu import Launch, LaunchKey, absent_gpu
from quickchange_kernels.gpu_targets import TARGETS
from quickchange_server.engine import model_runner
from quickchange_server.model.graphs.cuda_graphs import Outputs, computed_once


@dataclass
class LaunchRecord:
    """Launches and keys so far."""

    launches: Counter[str] = field(default_factory=Counter)  # by kernel; replays are none
    keys: defaultdict[str, dict[str, Mapping[str, Any]]] = field(
        default_factory=lambda: defaultdict(dict)
    )  # by kernel, then by Triton's key: what it noticed of each argument
    captures: list[int] = field(default_factory=list)  # rows of each captured graph
    capture_seconds: list[float] = field(default_factory=list)  # host time of one pass through it
    capture_launches: list[int] = field(default_factory=list)
    replayed: int = 0

    @property
    def key_count(self) -> int:
        return sum(map(len, self.keys.values()))

    def keys_since(self, known: dict[str, set[str]]) -> list[str]:
        """Kernels with keys that `known` lacks, each with the arguments that are new in it."""
        return [
            f"{kernel}: {_news(noticed, [self.keys[kernel][k] for k in known.get(kernel, ())])}"
            for kernel, found in self.keys.items()
            for key, noticed in found.items()
            if key not in known.get(kernel, ())
        ]

    def known(self) -> dict[str, set[str]]:
        """The keys so far, for `keys_since`."""
        return {kernel: set(found) for kernel, found in self.keys.items()}

    def capture(self, compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Capture a graph; see `cuda_graphs.Capture`. Its replay computes nothing."""
        before, started = self.launches.total(), time.thread_time()
        replay_outputs, outputs = computed_once(compute)
        self.capture_seconds.append(time.thread_time() - started)
        self.capture_launches.append(self.launches.total() - before)
        self.captures.append(outputs[0].shape[0])

        def replay() -> None:
            self.replayed += 1
            replay_outputs()

        return replay, outputs

    def on_launch(self, launch: Launch) -> None:
        self.launches[launch.kernel] += 1

    def on_key(self, key: LaunchKey) -> None:
        self.keys[key.kernel][key.key] = key.noticed


def _news(noticed: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Arguments with what no other key of the kernel has; all of them if it is their mixture."""
    new = {
        name: value
        for name, value in noticed.items()
        if all(other.get(name) != value for other in others)
    }
    return ", ".join(f"{name}={value}" for name, value in (new or noticed).items())


@contextmanager
def recorded_launches(target: str = "sm_90") -> Iterator[LaunchRecord]:
    """target: the GPU that the launchers see, by its name in `gpu_targets.py`."""
    record = LaunchRecord()
    with absent_gpu(TARGETS[target], record.on_launch, on_key=record.on_key, products=False):
        yield record


@contextmanager
def graphs_recorded(record: LaunchRecord) -> Iterator[None]:
    """Engines made inside run their decode steps from graphs that the record notes."""
    with mock.patch.object(model_runner, "capture_for", return_value=record.capture):
        yield
