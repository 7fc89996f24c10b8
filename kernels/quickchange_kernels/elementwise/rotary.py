"""rotary_: rotate queries and keys by their positions, in place (Su et al., 2021).

Contract
    q         [T, Hq, D], k [T, Hkv, D]  heads contiguous (any row and head strides); written
    cos, sin  [T, R]  k's dtype, rows contiguous, R even, R ≤ D; both halves alike, as transformers
              makes them. Columns R .. D of every head are not touched (partial rotary).
    With x₁, x₂ the halves of a head's first R columns: x₁ ← x₁ cos - x₂ sin, x₂ ← x₂ cos + x₁ sin
    in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] after the operation, in float64."""
    width = cos.shape[1]
    wide = x.double()
    first, second = wide[..., :width].chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = wide[..., :width] * cos.double()[:, None] + turned * sin.double()[:, None]
    return torch.cat([rotated, wide[..., width:]], dim=-1)


def plain_rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The operation in plain torch, for any device."""
    width = cos.shape[1]
    wide_cos, wide_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    for x in (q, k):
        rotated = x[..., :width]
        wide = rotated.float()
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        rotated.copy_(wide * wide_cos + turned * wide_sin)


_rotary_ = dispatch.declare(
    "rotary_",
    "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()",
    plain_rotary_,
    dispatch.writes_in_place,
)
dispatch.triton_version(
    "rotary_", "quickchange_kernels.elementwise.elementwise_triton:launch_rotary_"
)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q and k in place, on q's device. Contract above."""
    native.ensure()
    _rotary_(q, k, cos, sin)
