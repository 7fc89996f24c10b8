"""What PTX instructions compute from registers alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_memory import FaultError
from ptx_numbers import FLOAT, SIGNED, UNSIGNED, is_float, packed, unpacked, width_of
from ptx_parser import Instruction

if TYPE_CHECKING:
    from ptx_executor import Block

Array = NDArray[Any]

SMALLEST_NORMAL = np.float32(1.17549435e-38)
_TYPE = r"pred|bf16x2|f16x2|bf16|[usbf]\d+"

FLOATING: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda x, y, z: x * y + z,
    "mad": lambda x, y, z: x * y + z,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda x, y, z: x * y + z,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": lambda x, y: (x - np.fmod(x, y)) // y,  # toward zero
    "rem": np.fmod,
}
ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "max": max,
    "min": min,
    "exch": lambda _old, new: new,
    "or": lambda old, new: old | new,
    "and": lambda old, new: old & new,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}

REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def execute(block: Block, one: Instruction, lanes: Array) -> None:
    """Run one instruction of OPCODES."""
    name = one.opcode[0]
    if name in _SPECIAL:
        _SPECIAL[name](block, one, lanes)
    elif one.type in ("bf16x2", "f16x2"):
        _packed(block, one, lanes)
    elif is_float(one.type):
        _floating(block, one, lanes)
    else:
        _integer(block, one, lanes)


def _floating(block: Block, one: Instruction, lanes: Array) -> None:
    values = [block.read(operand, one.type, lanes) for operand in one.operands[1:]]
    if one.opcode[0] in ("fma", "mad"):  # one rounding: products of float32 are exact in float64
        values = [value.astype(np.float64) for value in values]
    dtype = np.float32 if one.type == "bf16" else FLOAT[width_of(one.type)]
    result = FLOATING[one.opcode[0]](*values).astype(dtype)
    if "ftz" in one.opcode and one.type == "f32":
        result = np.where(np.abs(result) < SMALLEST_NORMAL, result * np.float32(0), result)
    block.write(one.operands[0], result, one.type, lanes)


def _packed(block: Block, one: Instruction, lanes: Array) -> None:
    """Both halves of registers at once."""
    halves = zip(
        *(unpacked(block.bits(operand, lanes), one.type) for operand in one.operands[1:]),
        strict=True,
    )
    compute = FLOATING[one.opcode[0]]
    low, high = (
        compute(*(value.astype(np.float64) for value in half)).astype(np.float32) for half in halves
    )
    block.write(one.operands[0], packed(low, high, one.type), "u32", lanes)


def _integer(block: Block, one: Instruction, lanes: Array) -> None:
    values = [block.read(operand, one.type, lanes) for operand in one.operands[1:]]
    name, width = one.opcode[0], width_of(one.type)
    if name in ("mul", "mad") and ("wide" in one.opcode or "hi" in one.opcode):
        numbers = SIGNED if one.type[0] == "s" else UNSIGNED
        wide = numbers[width * 2]
        result = values[0].astype(wide) * values[1].astype(wide)
        kind = f"{one.type[0]}{width * 2}"
        if "hi" in one.opcode:
            result, kind = (result >> wide(width)).astype(numbers[width]), one.type
        if name == "mad":
            result = result + block.read(one.operands[3], kind, lanes)
        block.write(one.operands[0], result, kind, lanes)
        return
    block.write(one.operands[0], INTEGER[name](*values), one.type, lanes)


def _compare(block: Block, one: Instruction, lanes: Array) -> None:
    """setp, also joined with another predicate."""
    x, y = (block.read(operand, one.type, lanes) for operand in one.operands[1:3])
    name = one.opcode[1]
    holds = _compare_floats(name, x, y) if is_float(one.type) else COMPARISONS[name](x, y)
    if one.opcode[2] in LOGIC:
        other = one.operands[3]
        holds = LOGIC[one.opcode[2]](
            holds, block.read(other.lstrip("!"), "pred", lanes) ^ other.startswith("!")
        )
    block.register(one.operands[0].split("|")[0][1:])[lanes] = holds


def _compare_floats(name: str, x: Array, y: Array) -> Array:
    unordered: Array = np.isnan(x) | np.isnan(y)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if name in COMPARISONS:
        return COMPARISONS[name](x, y) & ~unordered
    return COMPARISONS[name.removesuffix("u")](x, y) | unordered  # "ltu": or unordered


def _select(block: Block, one: Instruction, lanes: Array) -> None:
    """selp."""
    first, second, condition = one.operands[1:]
    chosen = np.where(
        block.read(condition, "pred", lanes),
        block.bits(first, lanes).astype(np.uint64),
        block.bits(second, lanes).astype(np.uint64),
    )
    block.write(one.operands[0], chosen, f"u{width_of(one.type)}", lanes)


def _logic(block: Block, one: Instruction, lanes: Array) -> None:
    """and, or, xor, not; of predicates too."""
    register = block.register(one.operands[0][1:])
    values = [block.bits(operand, lanes).astype(register.dtype) for operand in one.operands[1:]]
    name = one.opcode[0]
    register[lanes] = ~values[0] if name == "not" else LOGIC[name](*values)


def _shift(block: Block, one: Instruction, lanes: Array) -> None:
    """shl and shr; a shift by the width or more leaves zeros, or copies of the sign."""
    signed = one.type[0] == "s"
    width = width_of(one.type)
    kind = f"{'s' if signed else 'u'}{width}"
    value = block.read(one.operands[1], kind, lanes)
    amount = block.bits(one.operands[2], lanes).astype(np.uint64)
    all_gone = amount >= width
    amount = np.minimum(amount, width - 1).astype(value.dtype)
    result = value << amount if one.opcode[0] == "shl" else value >> amount
    if not (signed and one.opcode[0] == "shr"):
        result = np.where(all_gone, value.dtype.type(0), result)
    block.write(one.operands[0], result, kind, lanes)


def _extract(block: Block, one: Instruction, lanes: Array) -> None:
    """bfe: some bits, sign-extended where the type is signed."""
    first, count = (int(operand, 0) for operand in one.operands[2:4])
    width = width_of(one.type)
    bits = block.bits(one.operands[1], lanes).astype(UNSIGNED[width])
    dtype = (SIGNED if one.type[0] == "s" else UNSIGNED)[width]
    moved = (bits << UNSIGNED[width](width - first - count)).view(dtype)
    result = moved >> dtype(width - count) if count else moved * 0
    block.write(one.operands[0], result, one.type, lanes)


def _insert(block: Block, one: Instruction, lanes: Array) -> None:
    """bfi: bits of the first operand into the second."""
    dtype = UNSIGNED[width_of(one.type)]
    new, old = (block.bits(operand, lanes).astype(dtype) for operand in one.operands[1:3])
    first, count = (int(operand, 0) for operand in one.operands[3:5])
    mask = dtype(((1 << count) - 1) << first)
    result = (old & ~mask) | ((new << dtype(first)) & mask)
    block.write(one.operands[0], result, f"u{width_of(one.type)}", lanes)


def _permute(block: Block, one: Instruction, lanes: Array) -> None:
    """prmt: four bytes chosen among eight, or their signs."""
    low, high, choice = (block.bits(part, lanes).astype(np.uint64) for part in one.operands[1:4])
    both = (low & np.uint64(0xFFFFFFFF)) | high << np.uint64(32)
    result = np.zeros(lanes.size, np.uint64)
    for place in range(4):
        selector = (choice >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(selector & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * place)
    block.write(one.operands[0], result, "u32", lanes)


def _convert(block: Block, one: Instruction, lanes: Array) -> None:
    """cvt."""
    target, source = [part for part in one.opcode if re.fullmatch(_TYPE, part)][-2:]
    if target in ("bf16x2", "f16x2"):
        high, low = (block.read(operand, source, lanes) for operand in one.operands[1:3])
        block.write(one.operands[0], packed(low, high, target), "u32", lanes)
        return
    values = block.read(one.operands[1], source, lanes)
    if target == "bf16":
        block.write(one.operands[0], values.astype(np.float32), target, lanes)
    elif is_float(target):
        block.write(one.operands[0], values.astype(FLOAT[width_of(target)]), target, lanes)
    else:
        if is_float(source):
            values = _rounded_to_integers(values, one)
        wide = np.uint64 if values.dtype.kind == "u" else np.int64
        numbers = (SIGNED if target[0] == "s" else UNSIGNED)[width_of(target)]
        block.write(one.operands[0], values.astype(wide).astype(numbers), target, lanes)


def _rounded_to_integers(values: Array, one: Instruction) -> Array:
    modes: dict[str, Callable[[Array], Array]] = {
        "rzi": np.trunc,
        "rmi": np.floor,
        "rpi": np.ceil,
        "rni": np.rint,
    }
    mode = next((modes[part] for part in one.opcode if part in modes), None)
    if mode is None:
        raise FaultError(f"a conversion to integers without a rounding: {one.text}")
    return np.nan_to_num(mode(values))


_SPECIAL: dict[str, Callable[[Block, Instruction, Array], None]] = {
    "setp": _compare,
    "selp": _select,
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "cvt": _convert,
}
OPCODES = frozenset({*FLOATING, *INTEGER, *_SPECIAL})
