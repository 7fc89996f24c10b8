"""Vectors as clients ask for them: lists of numbers, base64, or the bytes alone, in vLLM's dtypes.

bfloat16 and the two 8-bit floats are made here, rounded to the nearest and on ties to the even one,
as torch does: numpy has none of them.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from quickchange_server.frontend.embedding import Floats

EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]
Bytes = npt.NDArray[np.uint8]


def encoded(
    vector: Floats, how: str, dtype: EmbedDtype, endianness: Endianness
) -> list[float] | str:
    """The vector in a JSON answer: its numbers, or for "base64" the text of its bytes."""
    if how == "base64":
        return base64.b64encode(to_bytes(vector, dtype, endianness)).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def to_bytes(vector: Floats, dtype: EmbedDtype, endianness: Endianness) -> bytes:
    """The vector's numbers in a dtype; "native" is little-endian, as every served machine is."""
    numbers: npt.NDArray[np.generic]
    match dtype:
        case "float32":
            numbers = vector.astype("<f4")
        case "float16":
            with np.errstate(over="ignore"):  # to infinity, as in torch
                numbers = vector.astype("<f2")
        case "bfloat16":
            numbers = _bfloat16(vector)
        case "fp8_e4m3":
            numbers = _float8(vector, 4)
        case "fp8_e5m2":
            numbers = _float8(vector, 5)
    return (numbers.byteswap() if endianness == "big" else numbers).tobytes()


def _bfloat16(vector: Floats) -> npt.NDArray[np.uint16]:
    whole = vector.astype("<f4").view("<u4")
    short: npt.NDArray[np.uint16] = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype("<u2")
    return short


@cache
def _magnitudes(exponent_bits: int) -> npt.NDArray[np.float64]:
    """Values of an 8-bit float's codes from 0: to the largest that is finite, or for five exponent
    bits to the first that is not, which stands for infinity."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(127 if exponent_bits == 4 else 125)
    exponents, mantissas = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    parts = mantissas / 2.0**mantissa_bits + (exponents > 0)
    values: npt.NDArray[np.float64] = np.ldexp(parts, np.maximum(exponents, 1) - bias)
    return values


def _float8(vector: Floats, exponent_bits: int) -> Bytes:
    values = _magnitudes(exponent_bits)
    size = np.minimum(np.abs(vector.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    below = above - 1
    up, down = values[above] - size, size - values[below]
    codes = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    signed: Bytes = (codes | (np.signbit(vector) * 0x80)).astype(np.uint8)
    return signed
