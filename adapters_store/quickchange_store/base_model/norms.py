"""Norms of a base model that multiply by a weight, RMSNorm's and LayerNorm's kind.

Found by what they compute, on any device, the meta device included: (offset + weight) ⊙ n(x) +
bias, where n knows neither weight nor bias. So a trained norm is a gain and a bias on its output.
Knows nothing of adapters.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import ModuleShape

if TYPE_CHECKING:
    import torch
    from torch import nn

_OFFSETS = (0.0, 1.0)  # Gemma stores its norms' weights minus one
_TOLERANCE = 1e-4  # many norms compute in float32


def norms(network: nn.Module) -> dict[str, ModuleShape]:
    """The norms of a model by path, as modules whose inputs and outputs are the weight's width."""
    known: dict[tuple[type, int, bool], float | None] = {}
    found = {}
    for path, module in network.named_modules():
        weight = norm_weight(module)
        if weight is None:
            continue
        biased = getattr(module, "bias", None) is not None
        kind = (type(module), len(weight), biased)
        if kind not in known:
            known[kind] = _offset(module, len(weight), biased=biased)
        offset = known[kind]
        if offset is not None:
            found[path] = ModuleShape(
                "norm", len(weight), len(weight), bias=biased, weight_offset=offset
            )
    return found


def norm_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight [width] of a module that by its name and parameters may be a norm."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.pop("weight", None)
    named = "norm" in type(module).__name__.lower()
    others = {name: list(tensor.shape) for name, tensor in own.items()}
    if weight is None or not named or weight.ndim != 1 or any(module.children()):
        return None
    return weight if others in ({}, {"bias": list(weight.shape)}) else None


def _offset(norm: nn.Module, width: int, *, biased: bool) -> float | None:
    """What is added to the weight; None where the module computes something else."""
    import torch

    # Not the module itself: what moves a model's weights about may hang on its parameters and
    # on its `forward`, and take a weight that is only tried for its own.
    bare = copy.copy(norm)
    vars(bare).pop("forward", None)

    drawn = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(3, width, generator=drawn, dtype=torch.float64)

    def output(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = {"weight": weight, "bias": bias if biased else None}
        vars(bare)["_parameters"] = given
        out: torch.Tensor = type(norm).forward(bare, x[None, None])
        return out[0, 0].double()

    none = torch.zeros(width, dtype=torch.float64)
    try:
        unweighted = output(none, none)
        unit = output(none + 1, none) - unweighted
        whole = output(weight, bias)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None  # it takes more than its input, or has other parts: not what it looks like
    for offset in _OFFSETS:
        expected = (offset + weight) * unit + (bias if biased else 0)
        if _near(unweighted, offset * unit) and _near(whole, expected) and bool(unit.any()):
            return offset
    return None


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    same = found.shape == expected.shape and bool(found.isfinite().all())
    return same and bool((found - expected).abs().max() < _TOLERANCE)
