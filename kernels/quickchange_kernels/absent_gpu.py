"""A GPU that is not there: launchers run as they would on it, and nothing is launched.

Inside `absent_gpu` the operations on CPU tensors go to their Triton launchers, and Triton itself
binds, specialises and compiles each launch for the GPU that is named: the same code, the same keys,
the same entries in its cache. So what a program would launch can be counted, and compiled ahead, on
any machine. Outputs hold whatever their memory held, but for those that the host reads.

Triton replaced by its interpreter (TRITON_INTERPRET=1) has no compiler: there this does not work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from quickchange_kernels import dispatch, native
from quickchange_kernels.gpu_targets import Target, cpu_counts_as

_THREADS = 1024  # the most of a block
# Outputs that the host reads or that are followed as indices: what they hold after a launch. Tokens
# and soundness are alike, as graphs of other sizes leave theirs in the same memory.
_OUTPUTS = {
    "token_kernel": {"tokens": 1, "soundness": 1},
    "verify_kernel": {"accepted": 0, "token": 0, "path": 0},
}
_number = itertools.count()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that a GPU would have run."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]  # all of the kernel's, by name


@dataclass(frozen=True, slots=True)
class LaunchKey:
    """What Triton compiles a kernel for: once for each key."""

    kernel: str
    key: str  # Triton's own
    noticed: Mapping[str, Any]  # type, constant or divisibility of each argument, by name


OnLaunch = Callable[[Launch], None]
OnKey = Callable[[LaunchKey], None]


@contextmanager
def absent_gpu(
    target: Target,
    on_launch: OnLaunch = lambda _: None,
    *,
    on_key: OnKey | None = None,
    products: bool = True,
) -> Iterator[AbsentGpu]:
    """Let CPU tensors be served as by a GPU of this kind; `on_launch` is told of each launch.

    on_key: is told of each new key, and nothing is compiled. products: False: the model's own
    products, which need no kernel of ours, are not computed. Holds for the whole process. Raises
    what Triton's compiler raises, and OutOfResources for a kernel that takes more shared memory
    than the target has.
    """
    if dispatch.triton_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    native.ensure()  # registered later, it would stand in front
    before = driver._active
    gpu = AbsentGpu(target, on_launch)
    compile_ = JITFunction._do_compile if on_key is None else gpu.noting(on_key)
    driver.set_active(gpu)
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compile_),
            dispatch.triton_on_cpu(products=products),
            cpu_counts_as(target),
        ):
            yield gpu
    finally:
        driver._active = before


class AbsentGpu(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Triton's driver of a GPU that is not there."""

    def __init__(self, target: Target, on_launch: OnLaunch) -> None:
        self.target = target
        self.on_launch = on_launch
        self.utils = self
        self.launcher_cls = self._launcher
        # Kernels keep what they compiled by device: no real one has this name.
        self.device = f"absent {target.name}, {next(_number)}"

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton never chooses it by itself

    def map_python_to_cpp_type(self, *_: Any, **__: Any) -> str:
        raise RuntimeError("an absent GPU has no launcher in C")

    def get_current_target(self) -> Any:
        return self.target.triton_target()

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("an absent GPU takes no time")

    def get_device_properties(self, _device: str) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_per_block}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills and threads of a kernel; it stays where it is."""
        return None, None, 0, 0, _THREADS

    def _launcher(self, source: Any, _metadata: Any) -> Callable[..., None]:
        return self.launcher(source.fn)

    def launcher(self, kernel: Any) -> Callable[..., None]:
        """What Triton calls, in place of a kernel, with the grid and all arguments."""
        name, names = kernel.fn.__name__, kernel.arg_names

        # after the grid: stream, function, two kinds of metadata, two hooks; then the arguments
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = dict(zip(names, rest[6:], strict=True))
            for output, value in _OUTPUTS.get(name, {}).items():
                arguments[output].fill_(value)
            self.on_launch(Launch(name, (x, y, z), arguments))

        return launch

    def noting(self, on_key: OnKey) -> Callable[..., Any]:
        """What takes the place of Triton's compilation: `on_key` is told, nothing is compiled."""

        def note(kernel: Any, key: str, signature: Any, device: Any, constants: Any, options: Any,
                 attributes: Any, warmup: bool) -> _NoKernel:  # fmt: skip
            described = (key, signature, self.get_current_target(), device, constants, options)
            kernel._call_hook(knobs.runtime.jit_cache_hook, *described, [attributes], warmup)
            kernel.device_caches[device][0][key] = made = _NoKernel(self.launcher(kernel))
            noticed = _noticed(kernel.arg_names, signature, constants, attributes)
            on_key(LaunchKey(kernel.fn.__name__, key, noticed))
            kernel._call_hook(knobs.runtime.jit_post_compile_hook, *described, [attributes], warmup)
            return made

        return note


class _NoKernel:
    """The outcome of a compilation that was not made."""

    function = packed_metadata = None

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def launch_metadata(self, *_: Any) -> None:
        return None


def _noticed(names: list[str], signature: Any, constants: Any, attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(signature)
    found |= {names[place]: value for (place, *_), value in constants.items()}
    for (place, *_), value in attributes.items():
        if value:
            found[names[place]] = f"{found[names[place]]} of 16"
    return found
