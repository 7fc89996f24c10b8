"""linear: y = x Wᵀ + b for the few rows of a decode or verify step.

Contract
    x       [..., K]  float32, bfloat16 or float16; any strides
    weight  [N, K]    x's dtype; row-major as `nn.Linear` holds it: no packing, no second copy
    bias    [N]       or None
    returns [..., N]  new, contiguous, x's dtype; sums in float32 at least

The native CPU version takes up to `MAX_NATIVE_ROWS` rows of float32 or bfloat16 and hands longer
ones to `F.linear`. Within it every output element is summed in one order that depends on K alone,
so that a row's result does not depend on how many rows share the call (batch invariance, bitwise).

Measured on an AMD EPYC (Zen 4, AVX-512), one thread, SmolLM2-135M's layer shapes, ms, native and
F.linear: float32, 113 MB: 5.7 and 9.6 at 1 row, 7.2 and 14.8 at 8, 12.3 and 21.2 at 16, 40.8 and
50.4 at 64, 67.7 and 65.0 at 96. bfloat16, 57 MB: 3.2 and 7.1 at 1, 6.9 and 10.9 at 16, 24.4 and
23.5 at 64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native

MAX_NATIVE_ROWS = 64  # also in csrc/bind_linear.h; MKL is faster from about 90 rows


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operation in float64: [..., N]."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operation in plain torch, for any device."""
    return F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_linear = dispatch.declare(
    "linear", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", plain_linear, _fake
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operation on x's device. Contract above."""
    native.ensure()
    y: Tensor = _linear(x, weight, bias)
    return y
