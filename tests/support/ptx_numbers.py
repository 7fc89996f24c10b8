"""Register bits as numbers and back, as PTX types name them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}


def width_of(kind: str) -> int:
    """Bits of a type: 32 of "f32", 16 of "bf16"."""
    return int(kind.lstrip("bfsu"))


def is_float(kind: str) -> bool:
    """True of f16, bf16, f32 and f64."""
    return kind[0] == "f" or kind == "bf16"


def bfloat16_to_float32(bits: Array) -> Array:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """float32 rounded to nearest even, as bits; NaN becomes the hardware's one NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (last_kept + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded).astype(np.uint16)


def decoded(bits: Array, kind: str) -> Array:
    """The numbers that register bits stand for as a scalar type. bf16 becomes float32."""
    if kind == "pred":
        return bits.astype(bool)
    width = width_of(kind)
    exact = bits.astype(UNSIGNED[width])
    if kind == "bf16":
        return bfloat16_to_float32(exact)
    if kind[0] == "f":
        return exact.view(FLOAT[width])
    return exact.view(SIGNED[width]) if kind[0] == "s" else exact


def encoded(values: Array, kind: str, register: Any) -> Array:
    """Numbers as the bits of a register of numpy dtype `register`. Signed ones are extended."""
    if register.kind == "b":
        return values.astype(bool)
    if kind == "bf16":
        values = float32_to_bfloat16(values)
    elif is_float(kind):
        values = np.ascontiguousarray(values, FLOAT[width_of(kind)]).view(UNSIGNED[width_of(kind)])
    elif kind[0] == "s":
        values = values.astype(SIGNED[width_of(kind)]).astype(SIGNED[register.itemsize * 8])
    return values.astype(register)


def unpacked(bits: Array, kind: str) -> tuple[Array, Array]:
    """The low and high halves of f16x2 or bf16x2 registers, in float32."""
    halves = (bits.astype(np.uint32) & np.uint32(0xFFFF), bits.astype(np.uint32) >> np.uint32(16))
    low, high = (decoded(half, kind[:-2]).astype(np.float32) for half in halves)
    return low, high


def packed(low: Array, high: Array, kind: str) -> Array:
    """Two halves rounded into f16x2 or bf16x2 registers."""
    bits = [encoded(half, kind[:-2], np.dtype(np.uint16)).astype(np.uint32) for half in (low, high)]
    joined: Array = bits[0] | bits[1] << np.uint32(16)
    return joined
