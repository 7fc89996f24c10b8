"""linear_experts: each row through the linear of its own expert, y[i] = W[expert[i]] x + b.

Contract
    x       [R, K]     float32, bfloat16 or float16
    weight  [E, N, K]  x's dtype, any strides: experts that are stored [E, K, N] are given turned
    bias    [E, N]     or None
    expert  int64 [P]  each output row's; P is R or a multiple of it, and then P / R neighbouring
                       output rows read one row of x (a token's choices)
    returns [P, N]     new, contiguous, x's dtype; sums in float32 at least

The native CPU version takes weights whose rows are contiguous. It passes an expert's weights once
for all of its rows, and sums every output element in one order that depends on K alone (see
linear_float.py), so that a token's result does not depend on where the batch's others are routed.
Nothing is read on the host by the version for a GPU, in bfloat16 and for few rows in other types.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native

_FEW_ROWS = 64  # their experts' weights may be gathered


def reference_linear_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor
) -> Tensor:
    """The operation in float64: [P, N]."""
    rows = x.double().repeat_interleave(len(expert) // len(x), 0)
    y = torch.stack(
        [weight[e].double() @ row for row, e in zip(rows, expert.tolist(), strict=True)]
    )
    return y if bias is None else y + bias[expert].double()


def plain_linear_experts(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """The operation in plain torch, for any device."""
    choices = expert.shape[0] // x.shape[0]
    if x.is_cuda and x.dtype != torch.bfloat16 and expert.shape[0] <= _FEW_ROWS:
        # torch's grouped product of other types reads the groups' sizes on the host.
        rows = x.repeat_interleave(choices, 0)
        y = torch.bmm(weight[expert], rows.unsqueeze(2)).squeeze(2)
    else:
        sorted_experts, order = expert.sort(stable=True)
        experts = torch.arange(weight.shape[0], device=x.device)
        ends = torch.searchsorted(sorted_experts, experts, right=True).int()
        turned = weight.transpose(1, 2)
        y = x.new_empty(expert.shape[0], weight.shape[1])
        y[order] = F.grouped_mm(x[order // choices], turned, offs=ends)
    return y if bias is None else y + bias[expert]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty((expert.shape[0], weight.shape[1]))


_linear_experts = dispatch.declare(
    "linear_experts",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor expert) -> Tensor",
    plain_linear_experts,
    _fake,
)


def linear_experts(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """Each row through its expert's linear: [P, N]. Contract above."""
    native.ensure()
    y: Tensor = _linear_experts(x, weight, bias, expert)
    return y
