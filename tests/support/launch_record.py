"""Stands in for a GPU: the launchers run, each launch is noted, none is compiled or run.

Inside `recorded_launches` CPU tensors are served as on a GPU of the given kind. Each launch goes
through Triton's own binder, so that its key is what Triton would compile for; the kernel that the
key would have led to is a stand-in that does nothing, but for the few outputs that the host reads.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from quickchange_kernels.absent_gpu import Launch, absent_gpu
from quickchange_kernels.aot.targets import TARGETS
from quickchange_server.engine import model_runner
from quickchange_server.model.cuda_graphs import Outputs

TOKEN = 5  # that every row samples


@dataclass
class LaunchRecord:
    """Launches and keys so far."""

    launches: Counter[str] = field(default_factory=Counter)  # by kernel; replays are none
    keys: defaultdict[str, dict[str, dict[str, Any]]] = field(
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
        """Capture a graph; see `cuda_graphs.Capture`. Its replay takes no time."""
        before, started = self.launches.total(), time.thread_time()
        outputs = compute()
        self.capture_seconds.append(time.thread_time() - started)
        self.capture_launches.append(self.launches.total() - before)
        self.captures.append(outputs[0].shape[0])

        def replay() -> None:
            self.replayed += 1

        return replay, outputs

    def on_launch(self, launch: Launch) -> None:
        self.launches[launch.kernel] += 1
        effect = _EFFECTS.get(launch.kernel)
        if effect is not None:
            effect(**launch.arguments)


def _news(noticed: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Arguments with what no other key of the kernel has; all of them if it is their mixture."""
    new = {
        name: value
        for name, value in noticed.items()
        if all(other.get(name) != value for other in others)
    }
    return ", ".join(f"{name}={value}" for name, value in (new or noticed).items())


class _NoKernel:
    """The outcome of a compilation that was not made."""

    function = packed_metadata = None

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def launch_metadata(self, *_: Any) -> None:
        return None


@contextmanager
def recorded_launches(target: str = "sm_90") -> Iterator[LaunchRecord]:
    """target: the GPU that the launchers see, by its name in `aot.targets`."""
    record = LaunchRecord()
    with absent_gpu(TARGETS[target], record.on_launch) as gpu:

        def note(self: Any, key: str, signature: Any, device: Any, constants: Any, options: Any,
                 attributes: Any, warmup: bool) -> _NoKernel:  # fmt: skip
            described = (key, signature, gpu.target.triton_target(), device, constants, options)
            self._call_hook(knobs.runtime.jit_cache_hook, *described, [attributes], warmup)
            kernel = _NoKernel(gpu.launcher(self))
            self.device_caches[device][0][key] = kernel
            record.keys[self.fn.__name__][key] = _noticed(self, signature, constants, attributes)
            self._call_hook(knobs.runtime.jit_post_compile_hook, *described, [attributes], warmup)
            return kernel

        with mock.patch.object(JITFunction, "_do_compile", note):
            yield record


def _noticed(kernel: Any, signature: Any, constants: Any, attributes: Any) -> dict[str, Any]:
    """Type, constant or divisibility of each argument, by name."""
    found: dict[str, Any] = dict(signature)
    for (place, *_), value in constants.items():
        found[kernel.arg_names[place]] = value
    for (place, *_), value in attributes.items():
        if value:
            found[kernel.arg_names[place]] = f"{found[kernel.arg_names[place]]} of 16"
    return found


@contextmanager
def graphs_recorded(record: LaunchRecord) -> Iterator[None]:
    """Engines made inside run their decode steps from graphs that the record notes."""
    with mock.patch.object(model_runner, "capture_for", return_value=record.capture):
        yield


def _token(tokens: torch.Tensor, soundness: torch.Tensor, **_: Any) -> None:
    tokens.fill_(TOKEN)
    soundness.fill_(True)


_EFFECTS: dict[str, Callable[..., None]] = {"token_kernel": _token}
