"""Small modules of the base model computed in one pass: RMSNorm, gated MLPs.

A module is recognised by its parts and then by what it computes: on a random input the fused
version must give what the original gives, else the original stays. So no list of model names is
kept, and a model that only looks alike is left alone.
"""

from __future__ import annotations

import torch
from torch import nn

from quickchange_kernels.rms_norm import rms_norm
from quickchange_kernels.silu_mul import silu_mul
from quickchange_server.model.adapted import ProjectionPart, SharedProjection

# largest difference between original and fused, of the largest value in a row
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_OFFSETS = (0.0, 1.0)  # Gemma stores its norms' weights less one


class FusedRMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · (offset + weight).   x [..., K]."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset
        self.operands = (weight, eps, offset)  # rms_norm's and add_rms_norm's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, *self.operands)


class FusedGatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up in one product.   x [..., H]."""

    def __init__(self, gate_up: SharedProjection, down: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down
        self._gate_up = gate_up.compute
        self._down = down.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._down(silu_mul(self._gate_up(x)))
        return out


def fuse_small_modules(model: nn.Module) -> None:
    """Replace what is recognised, in place. Linears must be wrapped already."""
    for path, module in list(model.named_modules()):
        fused = _fused_norm(module) or _fused_mlp(module)
        if fused is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fused)


def _fused_norm(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and isinstance(eps, float)
        and weight.dtype in TOLERANCE
    ):
        return None
    sample = _sample(weight, weight.shape[0])
    for offset in _OFFSETS:
        fused = FusedRMSNorm(weight, eps, offset)
        if _agree(module, fused, sample):
            return fused
    return None


def _fused_mlp(module: nn.Module) -> nn.Module | None:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (
        isinstance(gate, ProjectionPart)
        and isinstance(up, ProjectionPart)
        and isinstance(down, nn.Module)
        and gate.shared is up.shared
        and gate.weight.dtype in TOLERANCE
    ):
        return None
    fused = FusedGatedMLP(gate.shared, down)
    return fused if _agree(module, fused, _sample(gate.weight, gate.weight.shape[1])) else None


def _sample(like: torch.Tensor, width: int) -> torch.Tensor:
    """Three rows [1, 3, width] of different size, the same each time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 3, width, generator=generator) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    return rows.to(like)


@torch.inference_mode()
def _agree(original: nn.Module, fused: nn.Module, sample: torch.Tensor) -> bool:
    try:
        expected = original(sample)
    except TypeError:
        return False  # it takes more than its input: not what it looks like
    tolerance = TOLERANCE[sample.dtype]
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(sample.dtype).tiny)
    return bool(((fused(sample) - expected).abs() / scale).max() < tolerance)
