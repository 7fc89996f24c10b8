"""A GPU that is not there: launchers run as they would on it, and nothing is launched.

Inside `absent_gpu` the operations on CPU tensors go to their Triton launchers, and Triton itself
binds, specialises and compiles each launch for the GPU that is named: the same code, the same keys,
the same entries in its cache. So what a program would launch can be counted, and compiled ahead, on
any machine. Outputs hold whatever their memory held, but for those that are followed as indices,
which are 0.

Triton replaced by its interpreter (TRITON_INTERPRET=1) has no compiler: there this does not work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from quickchange_kernels import dispatch, native
from quickchange_kernels.aot.targets import Target

_THREADS = 1024  # the most of a block
_INDICES = {"token_kernel": ("tokens",), "verify_kernel": ("accepted", "token", "path")}
_number = itertools.count()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that a GPU would have run."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]  # all of the kernel's, by name


OnLaunch = Callable[[Launch], None]


@contextmanager
def absent_gpu(
    target: Target, on_launch: OnLaunch = lambda _: None, *, products: bool = True
) -> Iterator[AbsentGpu]:
    """Let CPU tensors be served as by a GPU of this kind; `on_launch` is told of each launch.

    products: False: the model's own products, which need no kernel of ours, are not computed.
    Holds for the whole process. Raises what Triton's compiler raises, and OutOfResources for a
    kernel that takes more shared memory than the target has.
    """
    if dispatch.triton_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    native.ensure()  # registered later, it would stand in front
    before = driver._active
    gpu = AbsentGpu(target, on_launch)
    driver.set_active(gpu)
    try:
        with dispatch.triton_on_cpu(products=products):
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

    def map_python_to_cpp_type(self, ty: str) -> str:  # noqa: ARG002  Triton gives it by name
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
            for index in _INDICES.get(name, ()):
                arguments[index].zero_()
            self.on_launch(Launch(name, (x, y, z), arguments))

        return launch
