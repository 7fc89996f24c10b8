"""Weights from a formula, so that two programs with different libraries build the same model."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch


def formula_tensor(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Uniform numbers of this standard deviation that depend on name, place and nothing else."""
    count = math.prod(shape)
    angles = np.arange(count, dtype=np.float64) * 12.9898 + zlib.crc32(name.encode()) % 9973
    fractions = np.modf(np.sin(angles) * 43758.5453)[0]  # in (-1, 1)
    return torch.from_numpy(fractions * std * math.sqrt(3)).float().view(shape)


def fill(model: torch.nn.Module, std: float) -> None:
    """Give every parameter but the norms' its formula's weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(formula_tensor(name, tuple(parameter.shape), std))
