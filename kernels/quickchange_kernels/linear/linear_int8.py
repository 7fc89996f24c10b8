"""linear_int8: y = x Wᵀ + b over weights kept as int8 with a scale per row and group of 32.

Contract
    x       [..., K]          float32, bfloat16 or float16; any strides
    weight  [N, K]            int8, contiguous
    scale   [N, ⌈K / 32⌉]     bfloat16, contiguous: W[n, k] = weight[n, k] · scale[n, k // 32]
    bias    [N]               x's dtype, or None
    returns [..., N]          new, contiguous, x's dtype; sums in float32 at least

8.5 bits a weight, as GGML's Q8_0. The native CPU version multiplies with bfloat16 where the machine
has bfloat16 products (x is rounded to bfloat16 as well, and each weight times its scale), else with
float32. Where rows are few (up to 2 with bfloat16 products, up to 8 without) int8 weights become
such numbers in registers; beyond, 16 weight rows at a time do in the cache, and `linear`'s loops
follow. Both make the same products and add them in the same order, which depends on K alone: a
row's result does not depend on its batch.

`linear_quantized.py` quantises x too, which is faster and loses more. SmolLM2-135M, 2,048 tokens of
this project's documentation, KL to float32 in 1e-3 and share of equal first choices:

    weights int8           x as it is   1.2 (group 32, 0.978)   2.9 (128, 0.944)   5.2 (row, 0.937)
    x bfloat16             weights as they are   0.09 (0.991)
    x int8                 weights as they are   3.4 (group 32, 0.962)   11 (128)  37 (row)
    both int8, group 32    4.5 (0.960)

All of SmolLM2-135M's linears (143 MB) on two cores of an AMD EPYC (Zen 4), x in float32, median ms
of 9 at 1, 2, 4 and 8 rows; in brackets by way of the cache whatever the rows:

    bfloat16 products      7.7 (9.0)    8.7 (9.3)    11.1 (11.0)  14.5 (14.9)
    AVX-512 without        7.4 (13.4)   8.3 (14.0)   10.6 (18.0)  17.5 (25.5)

Adding up 256 MiB took 5.3 to 7.5 ms in these runs: at that speed the weights alone are 2.8 to 4.0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native

GROUP = 32  # weights of a row that share a scale; also INT8_GROUP in csrc/kernels.h
_LARGEST = 127


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantised `weight` [N, K]: (int8 [N, K], scale bfloat16 [N, ⌈K / 32⌉]).

    Raises ValueError where a weight is not finite.
    """
    out_features, in_features = weight.shape
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight that is infinite or no number can't be kept as int8")
    padded = F.pad(weight.float(), (0, -in_features % GROUP))
    groups = padded.view(out_features, -1, GROUP)
    scale = (groups.abs().amax(-1) / _LARGEST).bfloat16()
    # A group of zeros has the scale zero; what its weights are divided by doesn't matter then.
    steps = groups / scale.float().masked_fill(scale == 0, 1.0).unsqueeze(-1)
    quantized = steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return quantized.view(out_features, -1)[:, :in_features].contiguous(), scale


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that `weight` and `scale` stand for, rounded once, to `dtype`."""
    spread = scale.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * spread.to(wide)).to(dtype)


def reference_linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The operation in float64: [..., N]."""
    y = x.double() @ dequantize_int8(weight, scale, torch.float64).T
    return y if bias is None else y + bias.double()


def plain_linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The operation in plain torch, for any device: makes all weights of x's dtype anew."""
    return F.linear(x, dequantize_int8(weight, scale, x.dtype), bias)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_linear_int8 = dispatch.declare(
    "linear_int8",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    plain_linear_int8,
    _fake,
)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over int8 weights, on x's device: [..., N]. Contract above."""
    native.ensure()
    y: Tensor = _linear_int8(x, weight, scale, bias)
    return y
