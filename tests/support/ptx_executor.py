"""Runs the PTX that Triton writes for sm_80, in numpy: the compiled kernel with no GPU.

Where the interpreter runs the Python source, this runs what a GPU would run, so it shows what the
compiler made of a promise: a false `tl.multiple_of` is a misaligned or wrong access here. Warps run
one after another between barriers, in random order if a seed is given, so that a missing barrier
shows as well. Knows mma.sync, ldmatrix, cp.async, shfl and what surrounds them; none of the
instructions that only newer targets have.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import ptx_arithmetic as arithmetic
import torch
from numpy.typing import NDArray
from ptx_matrix import load_matrices, multiply
from ptx_memory import POISON, AsyncCopies, FaultError, GlobalMemory, SharedMemory, check_alignment
from ptx_numbers import UNSIGNED, decoded, encoded, width_of
from ptx_parser import Instruction, Program, parse, registers_of

Array = NDArray[Any]
WARP = 32


def launch(
    ptx: str,
    shared: int,
    grid: Sequence[int],
    arguments: Sequence[torch.Tensor | int | float],
    seed: int | None = None,
) -> None:
    """Run a kernel. Raises FaultError.

    shared: bytes of a block's shared memory. arguments: in the kernel's order, without constexpr
    ones; CPU tensors are passed as addresses, floats as float32. seed: of the order of warps;
    None: all warps in lockstep.
    """
    program = parse(ptx)
    tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
    memory = GlobalMemory(tensors)
    values = [_bits(argument) for argument in arguments]
    values += [0] * (len(program.parameters) - len(values))  # Triton's own scratch pointers
    parameters = dict(zip(program.parameters, values, strict=True))
    order = None if seed is None else random.Random(seed)
    shape = (*grid, 1, 1)[:3]
    for z, y, x in product(range(shape[2]), range(shape[1]), range(shape[0])):
        block = Block(program, memory, SharedMemory(shared), parameters, (x, y, z), shape)
        with np.errstate(all="ignore"):
            block.run(order)


def _bits(argument: torch.Tensor | int | float) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(np.array(argument, np.float32).view(np.uint32))
    return argument & (2**64 - 1)


class Block:
    """One block of threads: registers as one numpy array a name, a lane a thread."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        shared: SharedMemory,
        parameters: dict[str, int],
        index: Sequence[int],
        grid: Sequence[int],
    ) -> None:
        self.program, self.memory, self.shared = program, memory, shared
        self.parameters, self.index, self.grid = parameters, index, grid
        self.lanes = np.arange(program.threads)
        self.registers: dict[str, Array] = {}
        self.copies = [AsyncCopies() for _ in self.lanes]
        self.at = np.zeros(program.threads, np.int64)  # the next instruction of each thread
        self.done = np.zeros(program.threads, bool)

    # Threads

    def run(self, order: random.Random | None) -> None:
        """Run all threads to their end, from barrier to barrier."""
        units = [self.lanes]
        if order is not None:
            units = [self.lanes[first : first + WARP] for first in range(0, len(self.lanes), WARP)]
        while not self.done.all():
            if order is not None:
                order.shuffle(units)
            barriers = {stopped for unit in units if (stopped := self._advance(unit)) is not None}
            if len(barriers) > 1:
                raise FaultError(f"warps wait at different barriers: {sorted(barriers)}")
            self.at[~self.done] += 1

    def _advance(self, unit: Array) -> int | None:
        """Run some threads until their end (None) or a barrier (its instruction)."""
        instructions = self.program.instructions
        while (live := unit[~self.done[unit]]).size:
            number = int(self.at[live].min())  # those behind catch up first, so branches rejoin
            here = live[self.at[live] == number]
            if number >= len(instructions):
                self.done[here] = True
                continue
            instruction = instructions[number]
            if instruction.opcode[0] in ("bar", "barrier"):
                if here.size != live.size:
                    raise FaultError(f"a barrier that not all threads reach: {instruction.text}")
                return number
            self.at[here] = number + 1
            chosen = self._chosen(instruction, here)
            if instruction.opcode[0] == "bra":
                self.at[chosen] = self.program.labels[instruction.operands[0]]
            elif instruction.opcode[0] in ("ret", "exit"):
                self.done[chosen] = True
            elif chosen.size:
                self._execute(instruction, chosen)
        return None

    def _chosen(self, instruction: Instruction, lanes: Array) -> Array:
        if not instruction.predicate:
            return lanes
        holds = self.register(instruction.predicate)[lanes]
        chosen: Array = lanes[holds ^ instruction.negated]
        return chosen

    def _execute(self, instruction: Instruction, lanes: Array) -> None:
        operation = _OPERATIONS.get(instruction.opcode[0])
        if operation is None:
            raise FaultError(f"the executor doesn't know {instruction.text}")
        operation(self, instruction, lanes)

    # Operands

    def register(self, name: str) -> Array:
        """All lanes of a register, by its name without the percent sign."""
        if name not in self.registers:
            width = self.program.widths[name.rstrip("0123456789")]
            dtype = bool if width == 1 else UNSIGNED[width]
            self.registers[name] = np.zeros(len(self.lanes), dtype)
        return self.registers[name]

    def bits(self, operand: str, lanes: Array) -> Array:
        """What an operand holds, as unsigned integers."""
        if operand.startswith("%"):
            special = self._special(operand[1:], lanes)
            return self.register(operand[1:])[lanes] if special is None else special
        if operand == "global_smem":
            return np.zeros(lanes.size, np.uint64)
        if operand[:2] in ("0f", "0F"):
            return np.full(lanes.size, int(operand[2:], 16), np.uint32)
        if operand[:2] in ("0d", "0D"):
            return np.full(lanes.size, int(operand[2:], 16), np.uint64)
        return np.full(lanes.size, int(operand.rstrip("U"), 0) & (2**64 - 1), np.uint64)

    def _special(self, name: str, lanes: Array) -> Array | None:
        if name == "tid.x":
            return self.lanes[lanes].astype(np.uint32)
        if name == "laneid":
            return (self.lanes[lanes] % WARP).astype(np.uint32)
        kind, _, axis = name.partition(".")
        if axis not in ("x", "y", "z"):
            return None
        block = (len(self.lanes), 1, 1)
        known = {"tid": (0, 0, 0), "ctaid": self.index, "nctaid": self.grid, "ntid": block}
        return np.full(lanes.size, known[kind]["xyz".index(axis)], np.uint32)

    def read(self, operand: str, kind: str, lanes: Array) -> Array:
        """The numbers that an operand holds as a PTX type."""
        return decoded(self.bits(operand, lanes), kind)

    def write(self, operand: str, values: Array, kind: str, lanes: Array) -> None:
        """Put numbers of a PTX type into a register."""
        register = self.register(operand[1:])
        register[lanes] = encoded(values, kind, register.dtype)

    def addresses(self, operand: str, lanes: Array) -> Array:
        """The addresses of `[%rd1 + 16]`."""
        parts = re.fullmatch(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if parts is None:
            raise FaultError(f"an address that the executor can't read: {operand}")
        offset = int(parts[2] or "0", 0) & (2**64 - 1)
        total: Array = self.bits(parts[1], lanes).astype(np.uint64) + np.uint64(offset)
        return total

    # Loads, stores and copies

    def load(self, one: Instruction, lanes: Array) -> None:
        """ld of a parameter, or of one to four values a thread."""
        if "param" in one.opcode:
            value = self.parameters[one.operands[1].strip("[] ")]
            register = self.register(one.operands[0][1:])
            register[lanes] = np.uint64(value).astype(register.dtype)
            return
        targets, size = registers_of(one.operands[0]), width_of(one.type) // 8
        space = self.shared if "shared" in one.opcode else self.memory
        addresses = self.addresses(one.operands[1], lanes)
        data = space.load(addresses, size * len(targets), one.text)
        for position, target in enumerate(targets):
            part = np.ascontiguousarray(data[:, position * size : (position + 1) * size])
            self.write(
                target, decoded(part.view(UNSIGNED[size * 8])[:, 0], one.type), one.type, lanes
            )

    def store(self, one: Instruction, lanes: Array) -> None:
        """st of one to four values a thread."""
        dtype = UNSIGNED[width_of(one.type)]
        sources = registers_of(one.operands[1])
        columns = [self.bits(source, lanes).astype(dtype) for source in sources]
        data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        space = self.shared if "shared" in one.opcode else self.memory
        space.store(self.addresses(one.operands[0], lanes), data, one.text)

    def copy(self, one: Instruction, lanes: Array) -> None:
        """cp.async, its groups and its waits."""
        action = one.opcode[2]
        if action == "commit_group":
            for lane in lanes:
                self.copies[lane].commit()
        elif action in ("wait_group", "wait_all"):
            pending = int(one.operands[0], 0) if one.operands else 0
            for lane in lanes:
                if action == "wait_all":
                    self.copies[lane].commit()
                self.copies[lane].wait(pending, self.memory, self.shared, one.text)
        else:
            self._begin_copies(one, lanes)

    def _begin_copies(self, one: Instruction, lanes: Array) -> None:
        size = int(one.operands[2], 0)
        to, start = (self.addresses(operand, lanes) for operand in one.operands[:2])
        read = np.full(lanes.size, size)
        if len(one.operands) > 3:
            read = self.bits(one.operands[3], lanes).astype(np.int64)
        check_alignment(to, size, one.text)
        check_alignment(start[read > 0], size, one.text)
        for place, origin, used, lane in zip(to, start, read, lanes, strict=True):
            self.copies[lane].open.append((int(place), int(origin), size, int(used)))
            self.shared.bytes[int(place) : int(place) + size] = POISON

    def update(self, one: Instruction, lanes: Array) -> None:
        """atom and red on global memory, a thread after the other."""
        returns = one.opcode[0] == "atom"
        operands = one.operands if returns else ("", *one.operands)
        addresses = self.addresses(operands[1], lanes)
        values = self.read(operands[2], one.type, lanes)
        combine = next(arithmetic.ATOMIC[part] for part in one.opcode if part in arithmetic.ATOMIC)
        old = np.zeros(lanes.size, values.dtype)
        for position, value in enumerate(values):
            address = addresses[position : position + 1]
            data = self.memory.load(address, values.itemsize, one.text)
            old[position] = data.view(values.dtype)[0, 0]
            new = np.array([[combine(old[position], value)]], values.dtype)
            self.memory.store(address, new.view(np.uint8), one.text)
        if returns and operands[0] != "_":
            self.write(operands[0], old, one.type, lanes)

    # Registers

    def move(self, one: Instruction, lanes: Array) -> None:
        """mov, also between one wide register and several narrow ones."""
        target, source = one.operands
        width = width_of(one.type) if one.type != "pred" else 1
        if target.startswith("{"):
            parts = registers_of(target)
            each, value = width // len(parts), self.bits(source, lanes).astype(np.uint64)
            for position, part in enumerate(parts):
                if part != "_":
                    shifted = value >> np.uint64(each * position)
                    self.write(part, shifted & np.uint64((1 << each) - 1), f"u{each}", lanes)
        elif source.startswith("{"):
            parts = registers_of(source)
            each, joined = width // len(parts), np.zeros(lanes.size, np.uint64)
            for position, part in enumerate(parts):
                bits = self.bits(part, lanes).astype(np.uint64) & np.uint64((1 << each) - 1)
                joined |= bits << np.uint64(each * position)
            self.write(target, joined, f"u{width}", lanes)
        else:
            register = self.register(target[1:])
            register[lanes] = self.bits(source, lanes).astype(register.dtype)

    def shuffle(self, one: Instruction, lanes: Array) -> None:
        """shfl.sync of whole warps."""
        if lanes.size % WARP:
            raise FaultError(f"a shuffle that not all threads of a warp reach: {one.text}")
        values, places = (
            self.bits(operand, lanes).reshape(-1, WARP) for operand in one.operands[1:3]
        )
        own, distance = np.arange(WARP), places.astype(np.int64)
        source = {
            "bfly": own ^ distance,
            "idx": distance % WARP + 0 * own,
            "down": own + distance,
            "up": own - distance,
        }[one.opcode[2]]
        valid = (source >= 0) & (source < WARP)
        taken = np.take_along_axis(values, np.where(valid, source, own), 1)
        target, *held = one.operands[0].split("|")
        self.register(target[1:])[lanes] = taken.ravel()
        for predicate in held:
            self.register(predicate.strip()[1:])[lanes] = valid.ravel()

    def reduce(self, one: Instruction, lanes: Array) -> None:
        """redux.sync of whole warps."""
        if lanes.size % WARP:
            raise FaultError(f"a reduction that not all threads of a warp reach: {one.text}")
        values = self.read(one.operands[1], one.type, lanes).reshape(-1, WARP)
        total = arithmetic.REDUCTIONS[one.opcode[2]].reduce(values, axis=1, dtype=values.dtype)
        self.write(one.operands[0], np.repeat(total, WARP), one.type, lanes)

    def compute(self, one: Instruction, lanes: Array) -> None:
        """Arithmetic on registers: ptx_arithmetic says how."""
        arithmetic.execute(self, one, lanes)

    def load_matrices(self, one: Instruction, lanes: Array) -> None:
        """ldmatrix; ptx_matrix says how."""
        load_matrices(self, one, lanes)

    def multiply(self, one: Instruction, lanes: Array) -> None:
        """mma.sync; ptx_matrix says how."""
        multiply(self, one, lanes)

    def ignore(self, _one: Instruction, _lanes: Array) -> None:
        """Fences and hints: memory here is never out of order."""


_OPERATIONS: dict[str, Callable[[Block, Instruction, Array], None]] = {
    "ld": Block.load,
    "st": Block.store,
    "cp": Block.copy,
    "atom": Block.update,
    "red": Block.update,
    "mov": Block.move,
    "shfl": Block.shuffle,
    "redux": Block.reduce,
    "ldmatrix": Block.load_matrices,
    "mma": Block.multiply,
    **dict.fromkeys(arithmetic.OPCODES, Block.compute),
    **dict.fromkeys(("membar", "fence", "prefetch", "createpolicy"), Block.ignore),
}
