"""DoRA's gain, worked out once at import: Liu et al. 2024, as PEFT computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 4096  # of the weight: bounds the memory for large vocabularies


def dora_gain(
    magnitude: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """magnitude / ‖W + scale · B A‖, the norm of each of W's rows: [out] float32.

    magnitude [out], weight [out, in], a [r, in], b [out, r]; computed in float32.
    """
    import torch

    norms = []
    for begin in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        merged = weight[rows].float() + scale * (b[rows].float() @ a.float())
        norms.append(torch.linalg.vector_norm(merged, dim=1))
    return magnitude / torch.cat(norms)
