"""Launch keys, as Triton's own binder makes them: each is a compilation when it is first met."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

from triton.compiler.compiler import make_backend
from triton.runtime import jit

from quickchange_kernels.absent_gpu import absent_gpu
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.gpu_targets import TARGETS

_TARGET = TARGETS["sm_90"]
_BACKEND = make_backend(_TARGET.triton_target())

Key = tuple[Any, ...]


def key_of(one: Compilation) -> Key:
    """The key of the launches that a configuration is compiled for."""
    specialization = [
        ("constexpr", one.constants[name]) if name in one.constants else (one.signature[name], None)
        for name in one.kernel.arg_names
    ]
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **one.options}
    return _key(one.kernel, specialization, options)


def keys_of(compilations: Iterable[Compilation]) -> dict[Key, str]:
    """The keys of configurations, with their names."""
    return {key_of(one): one.name for one in compilations}


def _key(kernel: Any, specialization: list[tuple[str, Any]], options: dict[str, Any]) -> Key:
    return kernel.fn.__name__, tuple(specialization), tuple(sorted(options.items()))


@contextlib.contextmanager
def recorded_keys() -> Iterator[list[Key]]:
    """The keys of all launches in the block, in order; nothing is launched."""
    keys: list[Key] = []
    binders: dict[Any, Any] = {}

    def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del warmup
        assert all(size > 0 for size in grid), f"{kernel.fn.__name__}: empty grid {grid}"
        if kernel not in binders:
            binders[kernel] = jit.create_function_from_signature(
                kernel.signature, kernel.params, _BACKEND
            )
        _, specialization, options = binders[kernel](*positional, **named)
        keys.append(_key(kernel, specialization, options))

    with absent_gpu(_TARGET), mock.patch.object(jit.JITFunction, "run", run):
        yield keys
