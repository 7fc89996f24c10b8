"""Launch keys that no size at run time changes: how every Triton kernel of the package is declared.

Triton compiles a kernel anew for each launch key: the types of its arguments, its constants and
options, and, unless told otherwise, whether an integer is 1 or a multiple of 16 and a pointer one
of 16 bytes. A compilation takes seconds, so that such a key, first met while serving, halts all
streams. Here nothing but types, constants and options is left:

    fixed_kernel   declares a kernel none of whose arguments is specialised
    LaunchConfig   constants and options, from pure functions of the model's shape and the device;
                   a launch and the compilation that goes ahead of it are both made of one

What the compiler must know for loads of 16 bytes, the kernel says itself, by `wide_row` and
`wide_size` under a constant ALIGNED, which the launcher finds by `aligned`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from quickchange_kernels import dispatch
from quickchange_kernels.compilation import TARGETS, Compilation

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "u1",
}
WIDE = 16  # bytes


def fixed_kernel(function: Callable[..., Any]) -> Any:
    """triton.jit, with no argument specialised."""
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if "constexpr" not in str(each.annotation)]
    return triton.jit(function, do_not_specialize=names)


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer's type: *bf16."""
    return f"*{_TYPES[dtype]}"


def aligned(*tensors: Tensor) -> bool:
    """True if every row of every tensor [..., K] begins at a multiple of 16 bytes and ends there.

    A tensor of one dimension must only begin at one. A model's own sizes decide it: memory begins
    at multiples of 64 bytes, and views begin at multiples of the model's widths.
    """
    return all(
        size * tensor.itemsize % WIDE == 0
        for tensor in tensors
        if tensor.dim() > 1
        for size in (tensor.shape[-1], *tensor.stride()[:-1])
    ) and all(tensor.data_ptr() % WIDE == 0 for tensor in tensors)


DEPENDENT_TARGETS = tuple(name for name in TARGETS if re.match(r"sm_(9|1\d)\d", name))
OTHER_TARGETS = tuple(name for name in TARGETS if name not in DEPENDENT_TARGETS)


def gpu() -> Any:
    """Triton's target for the launches of this process (backend, arch); None when interpreted."""
    return None if dispatch.triton_interpreted() else driver.active.get_current_target()


def dependent_launch() -> bool:
    """True where a kernel may start before the one before it has ended (DEPENDENT_TARGETS)."""
    target = gpu()
    return target is not None and target.backend == "cuda" and target.arch >= 90


@triton.jit
def wide_row(base, offset, ALIGNED: tl.constexpr):
    """Pointer (or pointers) to a row, known to be a multiple of 16 bytes where it is."""
    place = base + offset
    return tl.multiple_of(place, 16) if ALIGNED else place


@triton.jit
def wide_size(size, row, ALIGNED: tl.constexpr):
    """Elements of a row that `row` points into, known to fill 16 bytes evenly where they do."""
    step: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    return size // step * step if ALIGNED else size


@dataclass(frozen=True)
class LaunchConfig:
    """Constants and options of one launch: with the arguments' types, its whole key."""

    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)  # further ones of Triton's compiler

    @property
    def keywords(self) -> dict[str, Any]:
        """The configuration as a launch takes it."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        return {**self.constants, **options}

    def compilation(
        self,
        name: str,
        kernel: Any,
        types: Mapping[str, str | None],
        *,
        products: bool = False,
        targets: tuple[str, ...] = TARGETS,
    ) -> Compilation:
        """The same to compile ahead. types: those of all other arguments; None: None is passed."""
        absent = {name: None for name, kind in types.items() if kind is None}
        return Compilation(
            name=name,
            kernel=kernel,
            signature={name: kind for name, kind in types.items() if kind is not None},
            constants={**self.constants, **absent},
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            products=products,
            options=self.options,
            targets=targets,
        )
