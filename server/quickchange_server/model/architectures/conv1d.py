"""GPT-2's Conv1D as the linear that it is, so that everything else knows one kind of linear."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linears_of_conv1d(model: nn.Module) -> None:
    """Replace each Conv1D in place by an `nn.Linear` on the transposed weight.

    One weight after the other, so that no more than one is in memory twice.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is Conv1D:
                setattr(parent, name, _linear(module))


def _linear(module: Conv1D) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(module.nx, module.nf)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear
