"""How a call finds the version of an operation for its device: PyTorch's own dispatcher.

Every operation is declared once under `torch.ops.quickchange` with its plain torch version, which
runs on any device, and a fake version for tracing. A faster version takes over for one device by
being registered for that dispatch key:

    CPU                  the native C++ kernels, once `native.ensure` has loaded them
    CPU, TRITON_INTERPRET=1   the Triton kernels under Triton's interpreter
    CUDA                 the Triton kernels

Knows nothing of what the operations do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

LIBRARY: Any = torch.library.Library("quickchange", "DEF")  # type: ignore[no-untyped-call]


def declare(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operation and return the callable that dispatches it.

    schema: as PyTorch writes it, e.g. "linear(Tensor x, ...) -> Tensor". plain: the version for
    every device that has no faster one. fake: makes the output's shape and dtype, computes nothing.
    """
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quickchange::{name}", fake, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.quickchange, name).default
    return overload


def writes_in_place(*_: Any) -> None:
    """The fake version of an operation that returns nothing."""


def triton_interpreted() -> bool:
    """True where Triton's interpreter stands in for a GPU: the native CPU kernels stay out."""
    return os.environ.get("TRITON_INTERPRET") == "1"
