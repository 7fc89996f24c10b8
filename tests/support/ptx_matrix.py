"""ldmatrix and mma.sync: matrices spread over the registers of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_memory import FaultError
from ptx_numbers import decoded
from ptx_parser import Instruction, registers_of

if TYPE_CHECKING:
    from ptx_executor import Block

Array = NDArray[Any]

WARP = 32
GROUP = np.arange(WARP) // 4  # the row of a fragment that a lane holds
PLACE = np.arange(WARP) % 4  # and which columns of it


def load_matrices(block: Block, one: Instruction, lanes: Array) -> None:
    """1, 2 or 4 matrices of 8 x 8 16-bit values; lane i gives the address of row i."""
    _whole_warps(one, lanes)
    targets = registers_of(one.operands[0])
    addresses = block.addresses(one.operands[1], lanes).reshape(-1, WARP)[:, : 8 * len(targets)]
    rows = block.shared.load(addresses.reshape(-1), 16, one.text).view(np.uint16)
    matrices = rows.reshape(-1, len(targets), 8, 8)  # [warp, matrix, row, column]
    if "trans" in one.opcode:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(targets), WARP)
    for position, target in enumerate(targets):
        block.register(target[1:])[lanes] = pairs[:, position].ravel()


def multiply(block: Block, one: Instruction, lanes: Array) -> None:
    """mma.sync.m16n8k*: D = A B + C, sums in float64 and rounded once to float32."""
    _whole_warps(one, lanes)
    kind = one.opcode[-2]
    depth = int(one.opcode[3].partition("k")[2])
    if kind not in ("bf16", "f16", "tf32") or one.type != "f32":
        raise FaultError(f"the executor doesn't multiply these types: {one.text}")
    d, a, b, c = (registers_of(operand) for operand in one.operands)
    each = 1 if kind == "tf32" else 2  # values a register
    left, right = _values(block, a, kind, lanes), _values(block, b, kind, lanes)
    A = np.zeros((lanes.size // WARP, 16, depth))
    B = np.zeros((lanes.size // WARP, depth, 8))
    for element in range(each):
        column = PLACE * each + element
        for position in range(len(a)):
            row = GROUP + 8 * (position % 2)
            A[:, row, column + 4 * each * (position // 2)] = left[position][..., element]
        for position in range(len(b)):
            B[:, column + 4 * each * position, GROUP] = right[position][..., element]
    products = A @ B
    for position, (target, addend) in enumerate(zip(d, c, strict=True)):
        mine = products[:, GROUP + 8 * (position // 2), PLACE * 2 + position % 2]
        total = block.read(addend, "f32", lanes) + mine.ravel()
        block.write(target, total.astype(np.float32), "f32", lanes)


def _values(block: Block, registers: list[str], kind: str, lanes: Array) -> list[Array]:
    """What the registers hold: [warp, lane, values a register] each."""
    found = []
    for register in registers:
        bits = block.bits(register, lanes).astype(np.uint32)
        if kind == "tf32":  # the low 13 bits of a float32 take no part
            values = decoded(bits & np.uint32(0xFFFFE000), "f32")[:, None]
        else:
            values = decoded(np.ascontiguousarray(bits)[:, None].view(np.uint16), kind)
        found.append(values.astype(np.float64).reshape(-1, WARP, values.shape[1]))
    return found


def _whole_warps(one: Instruction, lanes: Array) -> None:
    if lanes.size % WARP:
        raise FaultError(f"not all threads of a warp reach {one.text}")
