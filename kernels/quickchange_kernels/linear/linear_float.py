"""linear: y = x Wᵀ + b, from the one row of a decode step to a prefill chunk.

Contract
    x       [..., K]  float32, bfloat16 or float16; any strides
    weight  [N, K]    x's dtype; row-major as `nn.Linear` holds it
    bias    [N]       or None
    returns [..., N]  new, contiguous, x's dtype; sums in float32 at least

The native CPU version takes float32 and bfloat16 and sums every output element in one order that
depends on K alone, so a row's result does not depend on how many rows share the call, nor on where
a prompt was cut in chunks (batch invariance, bitwise). On a GPU `linear` is cuBLAS (or hipBLAS),
which chooses a kernel, and with it an order of sums, by the number of rows; `linear_fixed` is the
same contract with an order that the matrix's shape alone decides, there too.

On a CPU rows of x pass in tiles of 64 over 16 weight rows; the weights that come next are fetched
meanwhile, a few lines with each block of rows, so memory and arithmetic overlap.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native


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


_linear_fixed = dispatch.declare(
    "linear_fixed",
    "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    _linear,  # what the CPU's version has anyway
    _fake,
)
dispatch.triton_version(
    "linear_fixed", "quickchange_kernels.linear.linear_fixed_triton:launch_linear_fixed"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, on x's device: [..., N]. Contract above."""
    native.ensure()
    y: Tensor = _linear(x, weight, bias)
    return y


def linear_fixed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, summed in an order that the rows don't change: [..., N]. Contract above."""
    native.ensure()
    y: Tensor = _linear_fixed(x, weight, bias)
    return y
