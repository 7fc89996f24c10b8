"""Reads registers, spills, memory and instructions from what Triton's compiler wrote."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quickchange_kernels.aot.compiling import CompiledKernel
from quickchange_kernels.gpu_targets import Target

NVIDIA_PRODUCTS = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
AMD_PRODUCTS = r"\bv_(mfma|smfmac)_\w+"
SASS_BYTES = 16  # one instruction, since Volta


@dataclass(frozen=True)
class Resources:
    """Resources that one compiled kernel takes, in bytes except where named otherwise."""

    registers: int  # a thread
    spilled: int  # a thread: its stack, in device memory
    shared: int  # a block
    products: int  # tensor-core instructions written
    instructions: int  # machine instructions, padding included
    occupancy: float  # share of a processor's warps, 0 to 1


def assembly(kernel: CompiledKernel, target: Target) -> str:
    """The text in which loads and products are found: PTX or AMDGCN."""
    text: str = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    return text


def resources(kernel: CompiledKernel, target: Target) -> Resources:
    """Resources that the compiled kernel takes on its target."""
    read = _nvidia if target.backend == "cuda" else _amd
    registers, spilled, shared, products, instructions = read(kernel)
    occupancy = target.occupancy(registers, shared, kernel.num_warps)
    return Resources(registers, spilled, shared, products, instructions, occupancy)


def _nvidia(kernel: CompiledKernel) -> tuple[int, int, int, int, int]:
    cubin: bytes = kernel.asm["cubin"]
    usage = _resource_usage(cubin)
    products = len(re.findall(NVIDIA_PRODUCTS, kernel.asm["ptx"]))
    code = sum(size for name, size in _sections(cubin).items() if name.startswith(".text."))
    return (
        _number(r"REG:(\d+)", usage),
        _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        kernel.shared,
        products,
        code // SASS_BYTES,
    )


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sections(elf: bytes) -> dict[str, int]:
    """Sizes of the sections of a 64-bit ELF file, by name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    names_start = headers[names_index][4]
    return {
        elf[names_start + header[0] : elf.index(b"\0", names_start + header[0])].decode(): header[5]
        for header in headers
    }


def _amd(kernel: CompiledKernel) -> tuple[int, int, int, int, int]:
    text: str = kernel.asm["amdgcn"]
    instructions = re.findall(r"^\t[a-z]\w+(?=[ \n])", text, re.MULTILINE)
    shared = max(kernel.shared, _number(r"\.group_segment_fixed_size:\s+(\d+)", text))
    return (
        _number(r"\.vgpr_count:\s+(\d+)", text),
        _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        shared,
        len(re.findall(AMD_PRODUCTS, text)),
        len(instructions),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output lacks {pattern!r}: another version of Triton?")
    return int(found[1])
