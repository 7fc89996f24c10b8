"""Philox4x64-10, the counter-based generator behind (seed, position) sampling.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A pure function
of key and counter: nothing to seed, to store or to restore. Written out in Python integers since
building `numpy.random.Philox` costs three times as much (23 against 7 µs) for one number.
"""

from __future__ import annotations

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
