"""Lets Triton launches in this process compile for sm_80 and run in the PTX executor.

Launchers stay as they are: inside `launches_run_as_ptx` their kernels take CPU tensors, are
specialised on them as Triton would on a GPU (multiples of 16, ones), compiled, and executed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import ptx_executor
import triton
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

from quickchange_kernels.absent_gpu import absent_gpu
from quickchange_kernels.gpu_targets import TARGETS

TARGET = TARGETS["sm_80"].triton_target()  # the executor knows no instruction of newer ones


@contextlib.contextmanager
def launches_run_as_ptx(seed: int | None = 0) -> Iterator[None]:
    """seed: of the order of warps; None: all warps of a block in lockstep."""

    def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled, arguments, shape = compiled_launch(kernel, positional, named, grid)
        if not warmup:
            shared = compiled.metadata.shared
            ptx_executor.launch(compiled.asm["ptx"], shared, shape, arguments, seed)

    with absent_gpu(TARGETS["sm_80"]), mock.patch.object(jit.JITFunction, "run", run):
        yield


def compiled_launch(
    kernel: Any, positional: tuple[Any, ...], named: dict[str, Any], grid: Any
) -> tuple[Any, list[Any], tuple[int, ...]]:
    """What Triton would compile for a launch, its arguments in the PTX's order, and its grid."""
    backend = make_backend(TARGET)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*positional, **named)
    options, signature, constants, attributes = kernel._pack_args(
        backend, named, bound, specialization, options
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    arguments = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
    return compiled, arguments, tuple(grid(bound) if callable(grid) else grid)
