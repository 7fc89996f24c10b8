"""silu_mul: silu(gate) · up, for a gate and an up projection side by side in one output.

Contract
    x       [..., 2 I]  gate in columns [0, I), up in [I, 2 I); rows contiguous
    returns [..., I]    new, contiguous, x's dtype; computed in float32 and rounded once
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native


def reference_silu_mul(x: Tensor) -> Tensor:
    """The operation in float64."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def plain_silu_mul(x: Tensor) -> Tensor:
    """The operation in plain torch, for any device."""
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_silu_mul = dispatch.declare("silu_mul", "(Tensor x) -> Tensor", plain_silu_mul, _fake)
dispatch.triton_version(
    "silu_mul", "quickchange_kernels.elementwise.elementwise_triton:launch_silu_mul"
)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up, on x's device: [..., I]. Contract above."""
    native.ensure()
    y: Tensor = _silu_mul(x)
    return y
