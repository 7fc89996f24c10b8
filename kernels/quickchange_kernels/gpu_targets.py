"""GPU architectures and their limits: what the gate judges by, and what tiles are chosen by.

A device that is not listed counts as the closest one of its maker that is no newer, so that nothing
is taken for granted that it may lack.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture. Sizes in bytes; per processor: an NVIDIA SM or an AMD compute unit."""

    name: str
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str
    lanes: int  # threads a warp
    shared_per_block: int
    shared_per_processor: int
    warps_per_processor: int
    blocks_per_processor: int
    registers_per_processor: int  # 4 bytes each, for one thread
    register_granule: int  # registers are given to a warp in multiples of this, over all its lanes
    reserved_shared: int  # taken from a block by the system
    # Results of matrix products lie in registers beside their operands (mma.sync), not in memory of
    # their own (wgmma reads operands from shared memory, tcgen05 has results in tensor memory).
    products_in_registers: bool = False
    code_of: str | None = None  # the target whose PTX this one runs; None: its own

    def triton_target(self) -> Any:
        """The target as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.lanes)

    def blocks_resident(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of one kernel that fit on a processor at once."""
        granule = self.register_granule
        per_warp = -(-max(1, registers) * self.lanes // granule) * granule
        by_registers = self.registers_per_processor // per_warp // warps
        by_shared = self.shared_per_processor // max(1, shared + self.reserved_shared)
        by_warps = self.warps_per_processor // warps
        return min(by_registers, by_shared, by_warps, self.blocks_per_processor)

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the processor's warps that the resident blocks make up."""
        resident = self.blocks_resident(registers, shared, warps)
        return resident * warps / self.warps_per_processor


def _nvidia(
    arch: int,
    block_kib: int,
    processor_kib: int,
    warps: int = 64,
    blocks: int = 32,
    *,
    mma_sync: bool,
    code_of: str | None = None,
) -> Target:
    """Limits from the CUDA C++ Programming Guide, "Compute Capabilities"."""
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        lanes=32,
        shared_per_block=block_kib * KIB,
        shared_per_processor=processor_kib * KIB,
        warps_per_processor=warps,
        blocks_per_processor=blocks,
        registers_per_processor=65536,
        register_granule=256,
        reserved_shared=KIB,
        products_in_registers=mma_sync,
        code_of=code_of,
    )


# AMD CDNA 3: four SIMDs a compute unit, each with 512 vector registers and room for 8 waves.
_GFX942 = Target(
    name="gfx942",
    backend="hip",
    arch="gfx942",
    lanes=64,
    shared_per_block=64 * KIB,
    shared_per_processor=64 * KIB,
    warps_per_processor=32,
    blocks_per_processor=32,
    registers_per_processor=4 * 512 * 64,
    register_granule=8 * 64,
    reserved_shared=0,
    products_in_registers=False,  # 512 registers a thread
)

TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 163, 164, mma_sync=True),  # A100
        _nvidia(86, 99, 100, 48, 16, mma_sync=True, code_of="sm_80"),  # RTX 3090, A10
        _nvidia(89, 99, 100, 48, 24, mma_sync=True, code_of="sm_80"),  # RTX 4090, L4, L40S
        _nvidia(90, 227, 228, mma_sync=False),  # H100, H200
        _nvidia(100, 227, 228, mma_sync=False),  # B200
        _nvidia(120, 99, 100, 48, 24, mma_sync=True),  # RTX 5090, RTX PRO 6000
        _GFX942,  # MI300
    )
}


def named(names: str) -> list[Target]:
    """The targets of a comma-separated list. Raises ValueError for one that is not known."""
    unknown = [name for name in names.split(",") if name not in TARGETS]
    if unknown:
        raise ValueError(f"unknown target {', '.join(unknown)}: choose among {', '.join(TARGETS)}")
    return [TARGETS[name] for name in names.split(",")]


_standing_in: list[Target] = []  # those that CPU tensors are served as, the latest last


@contextmanager
def cpu_counts_as(target: Target) -> Iterator[None]:
    """Let CPU tensors be served as by this GPU, see `absent_gpu.py`."""
    _standing_in.append(target)
    try:
        yield
    finally:
        _standing_in.remove(target)


def target_of(device: torch.device) -> Target:
    """The target that a device counts as; a CPU as an H100 (under Triton's interpreter), or as the
    GPU that is told."""
    if device.type == "cpu" and _standing_in:
        return _standing_in[-1]
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    return _for_capability(_capability(device))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 9, 0
    return torch.cuda.get_device_capability(device)


def _for_capability(capability: tuple[int, int]) -> Target:
    arch = capability[0] * 10 + capability[1]
    known = [target for target in TARGETS.values() if target.backend == "cuda"]
    older = [target for target in known if int(target.arch) <= arch]
    return max(older, key=lambda target: int(target.arch), default=known[0])
