"""Linears of the base model: which are plain floats, and narrower ones made of these at load.

A checkpoint that is stored quantised brings linears of its library's own: packed weights, weights
of a subclass of tensors, another `forward`, hooks. They are called as they are. Knows nothing of
adapters: a wrapped linear calls a narrow one in place of the float one. Where the LM head shares
its weights with the embedding, it gets narrow rows of its own and the embedding keeps its numbers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from quickchange_kernels.linear.linear_int8 import linear_int8, quantize_int8
from quickchange_kernels.linear.linear_quantized import (
    PackedWeight,
    linear_quantized,
    pack_int4,
    pack_int8,
)
from quickchange_store.base_model.weight_reading import release

Quantization = Literal["none", "int8", "int8-exact", "int4"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of plain weights


class Int8Linear(nn.Module):
    """y = x Wᵀ + b, W int8 with one scale per row and group of 32, x as it is.

    x [..., K], y [..., N].
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        quantized, scale = quantize_int8(base.weight.detach())
        self.register_buffer("quantized", quantized)  # int8 [N, K]
        self.register_buffer("scale", scale)  # bfloat16 [N, groups]
        self.bias = base.bias
        self.weight = shape_only(base.weight)
        self._operands = (quantized, scale, base.bias)
        release(base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_int8(x, *self._operands)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b, W int8 or int4 in panels, x quantised on the way.   x [..., K], y [..., N]."""

    def __init__(self, base: nn.Linear, packed: PackedWeight) -> None:
        super().__init__()
        self.register_buffer("quantized", packed.weight)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("minimum", packed.minimum)
        self.bias = base.bias
        self.weight = shape_only(base.weight)
        self._operands = (packed, base.bias)
        release(base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_quantized(x, *self._operands)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Features in and out of a linear of any library; None for another module."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return features if all(type(count) is int for count in features) else None  # type: ignore[return-value]


def is_plain(module: nn.Module | None) -> bool:
    """True for a linear that computes x Wᵀ + b from a float `weight`, and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in FLOATS
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """True if calling the module does more than its `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def quantized_linear(module: nn.Module, quantization: Quantization) -> nn.Module:
    """A plain linear as `quantization` keeps it; what computes something else stays as it is."""
    if quantization == "none" or not is_plain(module):
        return module
    assert isinstance(module, nn.Linear)
    if quantization == "int8-exact":
        return Int8Linear(module)
    pack = pack_int4 if quantization == "int4" else pack_int8
    return QuantizedLinear(module, pack(module.weight.detach()))


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Raises ValueError if the device can't serve a base with this quantization."""
    if quantization != "none" and device.type != "cpu":
        raise ValueError(
            f"--quantization {quantization} (or QUICKCHANGE_QUANTIZATION) serves on --device cpu "
            f"only; on {device.type} use --quantization none with --dtype bfloat16, or a model "
            "that is stored quantised"
        )


def shape_only(weight: torch.Tensor) -> torch.Tensor:
    """Zeros like `weight` that take no memory: models ask for a shape, dtype or device."""
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
