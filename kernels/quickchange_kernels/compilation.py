"""Configurations of Triton kernels, from which they are compiled and checked without a GPU.

Each `*_triton.py` has `compilations()`, which yields one `Compilation` for every configuration that
ships; `python -m quickchange_kernels.aot` compiles them all for the targets of gpu_targets.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quickchange_kernels import gpu_targets

TARGETS = tuple(gpu_targets.TARGETS)
# Where a configuration ships that differs by nothing but the name of its dtype from one that is
# compiled for all: one of each compiler.
ONE_OF_EACH_COMPILER = ("sm_90", "gfx942")


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one kernel.

    Lines of the kernel that load the stream of weights (or keys and values), on which its speed
    rests, end in the comment `# stream`: there no load may be narrower than 16 bytes.
    """

    name: str  # unique over all kernels: "lowrank shrink, decode, rank 16, bf16"
    kernel: Any  # triton.JITFunction
    signature: Mapping[
        str, str
    ]  # type of each argument that is no constexpr: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]  # constexpr arguments
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()  # integers that are known to be; pointers always are
    products: bool = False  # has matrix products in 16 bits, so tensor cores must do them
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of Triton's compiler
    targets: tuple[str, ...] = TARGETS  # where this configuration ships
