"""Triton launches that are bound as on a GPU, and not compiled or run: which kernels they need.

Inside `launches_recorded` a launcher takes CPU tensors. What Triton would compile for each launch
is noted by the hash of its source and options, under which Triton's cache holds compiled kernels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

from quickchange_kernels.aot import compiling
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.gpu_targets import Target

Key = tuple[str, str, str]  # kernel's name, hash of its source, hash of its options


@contextlib.contextmanager
def launches_recorded(target: Target) -> Iterator[Counter[Key]]:
    """Launches of each kernel."""
    backend = make_backend(target.triton_target())
    launches: Counter[Key] = Counter()

    def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del warmup
        assert all(size >= 1 for size in grid), grid
        named |= {"debug": False, "instrumentation_mode": ""}
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*positional, **named)
        options, signature, constants, attributes = kernel._pack_args(
            backend, named, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        launches[kernel.fn.__name__, source.hash(), options.hash()] += 1

    with mock.patch.object(jit.JITFunction, "run", run):
        yield launches


def key_of(one: Compilation, target: Target) -> Key:
    """The kernel that `quickchange_kernels.aot` compiles for a configuration."""
    backend = make_backend(target.triton_target())
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **one.options}
    parsed = backend.parse_options(options)
    return one.kernel.fn.__name__, compiling.source(one).hash(), parsed.hash()
