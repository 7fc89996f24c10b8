"""Dispatch of an operation to the version for its device, by PyTorch's own dispatcher.

Every operation is declared once under `torch.ops.quickchange` with its plain torch version, which
runs on any device, and a fake version for tracing. A faster version takes over for one device by
being registered for that dispatch key:

    CPU     the native C++ kernels, once `native.ensure` has loaded them; where TRITON_INTERPRET is
            1 they stay out, and the Triton kernels serve under the interpreter
    CUDA    the Triton kernels

Inside `triton_on_cpu` the Triton launchers serve CPU tensors as well, for whoever stands in for the
GPU behind them.

The overload `plain` of each operation is always the plain version. Knows nothing of what the
operations do.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LIBRARY: Any = torch.library.Library("quickchange", "DEF")  # type: ignore[no-untyped-call]
_launchers: dict[str, Callable[..., Any]] = {}  # by operation
_fakes: dict[str, Callable[..., Any]] = {}  # the same
_PRODUCTS = ("linear", "linear_experts")  # operations that torch serves on a GPU
_in_front: list[Any] = []  # the library that serves CPU tensors inside `triton_on_cpu`


def declare(
    name: str, signature: str, plain: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an operation and return the callable that dispatches it.

    signature: as PyTorch writes a schema, without the name: "(Tensor x, ...) -> Tensor".
    plain: the version for every device that has no faster one. fake: makes an output of the
    right shape and dtype, computes nothing.
    """
    for overload in (name, f"{name}.plain"):
        LIBRARY.define(f"{overload}{signature}")
        LIBRARY.impl(overload, plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"quickchange::{overload}", fake, lib=LIBRARY)
    _fakes[name] = fake
    dispatched: Callable[..., Any] = getattr(torch.ops.quickchange, name).default
    return dispatched


def triton_version(name: str, launcher: str) -> None:
    """Let a Triton launcher serve `name` on the GPU, or on the CPU under Triton's interpreter.

    launcher: "module:function", imported at the first call, so that a machine without a GPU never
    imports Triton. It takes the operation's arguments as its schema names them.
    """
    module, _, function = launcher.partition(":")

    @functools.cache
    def imported() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found

    schema = getattr(torch.ops.quickchange, name).default._schema
    defaults = [argument.default_value for argument in schema.arguments]

    def call(*args: Any) -> Any:
        # PyTorch leaves out the last arguments where they equal their defaults.
        return imported()(*args, *defaults[len(args) :])

    _launchers[name] = call
    LIBRARY.impl(name, call, "CPU" if triton_interpreted() else "CUDA")
    for library in _in_front:
        library.impl(name, call, "CPU")


@contextmanager
def triton_on_cpu(*, products: bool = True) -> Iterator[None]:
    """Let the Triton launchers serve CPU tensors too, in front of every other version.

    products: False: the model's own products are not computed either.
    """
    library: Any = torch.library.Library("quickchange", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        skipped = {} if products else {name: _fakes[name] for name in _PRODUCTS if name in _fakes}
        for name, call in (_launchers | skipped).items():
            library.impl(name, call, "CPU")
    _in_front.append(library)
    try:
        yield
    finally:
        _in_front.remove(library)
        library._destroy()


def triton_serves(device: torch.device) -> bool:
    """True if the Triton launchers serve the device's tensors."""
    return device.type != "cpu" or triton_interpreted() or bool(_in_front)


def triton_compiles(device: torch.device) -> bool:
    """True if kernels for the device's tensors are compiled when they are first launched."""
    return triton_serves(device) and not triton_interpreted()


def writes_in_place(*_: Any) -> None:
    """The fake version of an operation that returns nothing."""


def triton_interpreted() -> bool:
    """True where Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
