"""Alignment of [rows, heads, width] operands: one answer for each shape, so one compiled kernel.

Triton compiles a kernel anew for pointers and strides that are no multiples of 16 bytes. What the
kernels are told here follows from the width and the dtype alone, and launchers make it true.
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 16  # of the widest load


def aligned_elements(width: int, itemsize: int) -> int:
    """Elements of which strides are multiples for heads of this width: 16 bytes of them, or 1."""
    return BYTES // itemsize if width * itemsize % BYTES == 0 else 1


def aligned_heads(x: Tensor) -> Tensor:
    """The operand itself, or a copy where its strides or its address are not what is promised."""
    step = aligned_elements(x.shape[2], x.itemsize)
    kept = x.stride(2) == 1 and x.stride(0) % step == 0 == x.stride(1) % step
    if kept and is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def is_aligned(x: Tensor) -> bool:
    """True if the tensor begins at a multiple of 16 bytes, as everything that torch allocates."""
    return x.data_ptr() % BYTES == 0
