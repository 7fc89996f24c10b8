"""Philox4x64-10, the counter-based generator behind (seed, position) sampling.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A pure function
of key and counter: nothing to seed, to store or to restore. The numbers are made on the host, where
seeds and positions are. One takes 7 µs in Python (building `numpy.random.Philox` takes 23); the
native version makes a batch in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels import dispatch, native

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = (1 << 64) - 1


def philox_word(seed: int, position: int) -> int:
    """First 64-bit word for key `seed` (taken modulo 2^64) and counter `position` (>= 0)."""
    x0, x1, x2, x3 = position & _WORD, 0, 0, 0
    key0, key1 = seed & _WORD, 0
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1 = (second >> 64) ^ x1 ^ key0, second & _WORD
        x2, x3 = (first >> 64) ^ x3 ^ key1, first & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return x0


def uniform(seed: int, position: int) -> float:
    """The one number in [0, 1), a multiple of 2^-53, that chooses the token at `position`."""
    return (philox_word(seed, position) >> 11) * 2.0**-53


def plain_philox_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 [R] of int64 [R] keys (their bits) and counters."""
    pairs = zip(seed.tolist(), position.tolist(), strict=True)
    return torch.tensor([uniform(*pair) for pair in pairs], dtype=torch.float64)


def _fake(seed: Tensor, position: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(seed, dtype=torch.float64)


_philox_uniform = dispatch.declare(
    "philox_uniform", "(Tensor seed, Tensor position) -> Tensor", plain_philox_uniform, _fake
)


def philox_keys(seeds: Sequence[int]) -> npt.NDArray[np.int64]:
    """The bits of the seeds' keys, for `uniforms`."""
    return np.array([seed & _WORD for seed in seeds], dtype=np.uint64).view(np.int64)


def uniforms(
    keys: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """float64 [R]: `uniform` of each pair of a key, by its bits, and a position."""
    native.ensure()
    out: Tensor = _philox_uniform(torch.from_numpy(keys), torch.from_numpy(positions))
    return out.numpy()
