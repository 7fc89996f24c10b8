"""rms_norm: x / √(mean(x²) + eps) · (offset + weight), row by row.

Contract
    x       [..., K]  float32, bfloat16 or float16; rows contiguous
    weight  [K]       x's dtype
    offset  0, or 1 where the model stores weight - 1 (Gemma)
    returns [..., K]  new, contiguous, x's dtype; computed in float32 and rounded once
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The operation in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The operation in plain torch, for any device."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (offset + weight.float())).to(x.dtype)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_rms_norm = dispatch.declare(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor",
    plain_rms_norm,
    _fake,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The operation on x's device. Contract above."""
    native.ensure()
    y: Tensor = _rms_norm(x, weight, eps, offset)
    return y
