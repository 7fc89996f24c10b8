"""rms_norm: x / √(mean(x²) + eps) · (offset + weight), row by row (Zhang and Sennrich, 2019).
add_rms_norm: the same of x + delta, and that sum: a residual stream and the norm that follows.

Contract
    x       [..., K]  float32, bfloat16 or float16; rows contiguous
    delta   [..., K]  x's shape and dtype; rows contiguous
    weight  [K]       x's dtype
    offset  0, or 1 where the model stores weight - 1 (Gemma)
    returns [..., K]  new, contiguous, x's dtype; computed in float32 and rounded once
            add_rms_norm: (x + delta rounded to x's dtype, the norm of that)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """rms_norm in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


def reference_add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """add_rms_norm in float64, but for the sum's rounding."""
    total = (x.double() + delta.double()).to(x.dtype)
    return total, reference_rms_norm(total, weight, eps, offset)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """rms_norm in plain torch, for any device."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (offset + weight.float())).to(x.dtype)


def plain_add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """add_rms_norm in plain torch, for any device."""
    total = (x + delta).contiguous()
    return total, plain_rms_norm(total, weight, eps, offset)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_add(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake(x), _fake(x)


_rms_norm = dispatch.declare(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor",
    plain_rms_norm,
    _fake,
)
_add_rms_norm = dispatch.declare(
    "add_rms_norm",
    "(Tensor x, Tensor delta, Tensor weight, float eps, float offset=0.0) -> (Tensor, Tensor)",
    plain_add_rms_norm,
    _fake_add,
)
dispatch.triton_version(
    "rms_norm", "quickchange_kernels.elementwise.elementwise_triton:launch_rms_norm"
)
dispatch.triton_version(
    "add_rms_norm", "quickchange_kernels.elementwise.elementwise_triton:launch_add_rms_norm"
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm of x's rows, on x's device: [..., K]. Contract above."""
    native.ensure()
    y: Tensor = _rms_norm(x, weight, eps, offset)
    return y


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm of it), on x's device. Contract above."""
    native.ensure()
    total, normed = _add_rms_norm(x, delta, weight, eps, offset)
    return total, normed
