"""Costs that the compiled kernels add to their floors, read from the machine code for sm_90."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quickchange_kernels.aot import compiling, inspection
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.gpu_targets import TARGETS
from quickchange_kernels.roofline import floors
from quickchange_kernels.roofline.floors import VALUE, KernelWork, StepBatch
from quickchange_kernels.roofline.machine import GpuRates, Linear

TARGET = TARGETS["sm_90"]
LANES = 32


@dataclass(frozen=True)
class Loop:
    """The innermost loop over the stream, or the whole kernel where it has none."""

    instructions: int
    bytes_loaded: int  # by one warp in one round

    def ceiling(self, machine: GpuRates) -> float:
        """Bytes/s that the whole GPU could load, were issuing instructions all that took time."""
        per_instruction = self.bytes_loaded / self.instructions
        return per_instruction * machine.issue_rate * machine.processors


@dataclass(frozen=True)
class Measured:
    """One configuration, compiled."""

    one: Compilation
    registers: int
    resident: int  # blocks on one processor
    loop: Loop


def measured(one: Compilation) -> Measured:
    """Compile a configuration and read its code."""
    kernel = compiling.compiled(one, TARGET)
    taken = inspection.resources(kernel, TARGET)
    resident = TARGET.blocks_resident(taken.registers, taken.shared, one.num_warps)
    return Measured(one, taken.registers, resident, hot_loop(_disassembled(kernel.asm["cubin"])))


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot_loop(sass: str) -> Loop:
    """The shortest loop that holds loads as wide as the widest of the kernel."""
    instructions, labels = _instructions(sass)
    widest = max(map(_bytes_loaded, instructions), default=0)
    loops = [
        instructions[labels[target] : at + 1]
        for at, text in enumerate(instructions)
        if (target := _branch_target(text)) in labels and labels[target] <= at
    ]
    streaming = [loop for loop in loops if widest in map(_bytes_loaded, loop)]
    chosen = min(streaming, key=len, default=instructions)
    return Loop(len(chosen), LANES * sum(map(_bytes_loaded, chosen)))


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
            instructions.append(code[1])
    return instructions, labels


def _branch_target(instruction: str) -> str:
    found = re.search(r"\bBRA\b.*\((\.L_x_\w+)\)", instruction)
    return found[1] if found else ""


def _bytes_loaded(instruction: str) -> int:
    """Bytes that one lane loads from device memory."""
    found = re.search(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)", instruction)
    if found is None:
        return 0
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in found[1].split(".") if part in sizes), 4)


@dataclass(frozen=True)
class MeasuredLaunch:
    """One launch of a kernel, and its floor."""

    name: str
    kernel: Measured
    programs: int
    program_in_flight: int  # bytes that one program has on their way
    floor: KernelWork

    def waves(self, machine: GpuRates) -> float:
        """Number of times that the programs fill the GPU."""
        return self.programs / (machine.processors * self.kernel.resident)

    def in_flight(self, machine: GpuRates) -> int:
        """Bytes on their way at once, with all processors as full as they get."""
        wave = machine.processors * self.kernel.resident
        return min(self.programs, wave) * self.program_in_flight

    def seconds(self, machine: GpuRates) -> float:
        """Estimate of the time: the floor, stretched where too few bytes are on their way at once
        and by a last wave that is not full; and the launch itself."""
        starved = max(1.0, machine.bytes_in_flight / self.in_flight(machine))
        waves = self.waves(machine)
        tail = math.ceil(waves) / waves if waves > 1 else 1.0
        return self.floor.seconds(machine) * starved * tail + machine.launch


def shipped() -> list[Compilation]:
    """Every configuration of the package that ships on the target."""
    return [
        one
        for module in compiling.kernel_modules()
        for one in compiling.compilations_of(module)
        if TARGET.name in one.targets
    ]


def shown() -> list[Compilation]:
    """Shipped configurations with products in 16 bits."""
    return [one for one in shipped() if one.products]


@functools.cache
def _lowrank_kernel(name: str, features: int, height: int) -> Measured:
    """The bf16 configuration of a low-rank kernel for a number of features and a tile height."""
    for one in shipped():
        same = one.kernel.fn.__name__ == name and one.constants["HEIGHT"] == height
        if same and one.name.endswith("bf16") and f"{features} features" in one.name:
            return measured(one)
    raise ValueError(f"no shipped configuration of {name}, {features} features, {height} rows")


def lowrank_launches(group: Linear, batch: StepBatch) -> list[MeasuredLaunch]:
    """shrink and expand of one call, for rows spread evenly over the adapters."""
    from quickchange_kernels.lowrank.lowrank_tables import RANKS_PER_PAGE, tile_height
    from quickchange_kernels.lowrank.lowrank_tuning import chunk_programs

    height = tile_height(-(-batch.rows // batch.adapters))
    shrink = _lowrank_kernel("shrink_kernel", group.inputs, height)
    expand = _lowrank_kernel("expand_kernel", group.inputs, height)
    narrow, wide = shrink.one.constants, expand.one.constants
    pieces = batch.adapters * -(-batch.rows // (batch.adapters * height))
    pages = len(group.outputs) * -(-batch.rank // RANKS_PER_PAGE)
    chunks = -(-pages // narrow["PAGES"])
    programs = chunk_programs(pages, narrow["PAGES"], pieces * wide["PARTS"])
    a_tile = narrow["PAGES"] * RANKS_PER_PAGE * narrow["BLOCK_K"]
    b_tile = wide["PAGES"] * RANKS_PER_PAGE * wide["BLOCK_N"]
    return [
        MeasuredLaunch(
            "shrink",
            shrink,
            pieces * min(chunks, programs) * wide["PARTS"],
            VALUE * a_tile * (shrink.one.num_stages - 1),
            floors.shrink(group, batch, wide["PARTS"]),
        ),
        MeasuredLaunch(
            "expand",
            expand,
            pieces * -(-sum(group.outputs) // wide["BLOCK_N"]),
            VALUE * b_tile,
            floors.expand(group, batch, wide["PARTS"]),
        ),
    ]
