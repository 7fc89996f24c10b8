"""Factors of a matrix: exact ones where its rank is low, else the nearest of a given rank.

Works in float64, in which a matrix of rank r has r singular values that count and others at 1e-15
of the first; knows nothing of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXACT_ERROR = 2e-7  # of the norm: half of float32's last place, twice
_SEED = 20_240_601  # the same matrix has the same factors, so the same digest
_DENSE = 1024  # the smaller side up to which all singular values are computed
_FIRST = 32  # columns sampled at first
_SPARE = 8  # columns sampled beyond the rank
_PASSES = 6  # over the matrix, for the nearest of a rank


@dataclass(frozen=True, slots=True)
class Factors:
    """B [out, r] and A [r, in], float32, with B A near the matrix [out, in]."""

    a: torch.Tensor
    b: torch.Tensor
    error: float  # Frobenius norm of what is left out
    norm: float  # Frobenius norm of the matrix


def exact_factors(matrix: torch.Tensor, limit: int) -> Factors | None:
    """Factors of a matrix [out, in] whose rank is `limit` at most; None where it is higher."""
    import torch

    norm = float(torch.linalg.matrix_norm(matrix))
    if min(matrix.shape) <= _DENSE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = _numeric_rank(values, norm)
        return None if rank > limit else _factors(matrix, norm, left, values, right, rank)
    size = _FIRST
    while True:
        basis = _range(matrix, min(size, limit) + _SPARE)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        missed = float(torch.linalg.matrix_norm(matrix - basis @ (basis.T @ matrix)))
        rank = _numeric_rank(values, norm)
        if missed <= EXACT_ERROR * norm and rank <= limit:
            return _factors(matrix, norm, basis @ left, values, right, rank)
        if size >= limit:
            return None
        size *= 2


def nearest_factors(matrix: torch.Tensor, rank: int) -> Factors:
    """Factors of the matrix of rank `rank` that is nearest to `matrix` [out, in]."""
    import torch

    norm = float(torch.linalg.matrix_norm(matrix))
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(_DENSE, 4 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return _factors(matrix, norm, left, values, right, rank)
    basis = _range(matrix, rank + max(_SPARE, rank // 2))
    for _ in range(_PASSES):
        turned, _r = torch.linalg.qr(matrix.T @ basis)
        basis, _r = torch.linalg.qr(matrix @ turned)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return _factors(matrix, norm, basis @ left, values, right, rank)


def _range(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """An orthonormal basis of the space that random combinations of the columns span."""
    import torch

    drawn = torch.Generator().manual_seed(_SEED)
    sample = torch.randn(matrix.shape[1], columns, generator=drawn, dtype=matrix.dtype)
    basis: torch.Tensor = torch.linalg.qr(matrix @ sample)[0]
    return basis


def _numeric_rank(values: torch.Tensor, norm: float) -> int:
    """The number of singular values, the largest first, that leave less than EXACT_ERROR of all."""
    left = values.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of those from each one on
    return int((left > EXACT_ERROR * norm).sum())


def _factors(
    matrix: torch.Tensor,
    norm: float,
    left: torch.Tensor,
    values: torch.Tensor,
    right: torch.Tensor,
    rank: int,
) -> Factors:
    import torch

    root = values[:rank].sqrt()
    b, a = left[:, :rank] * root, root[:, None] * right[:rank]
    error = float(torch.linalg.matrix_norm(matrix - b @ a))
    return Factors(a.float().contiguous(), b.float().contiguous(), error, norm)
