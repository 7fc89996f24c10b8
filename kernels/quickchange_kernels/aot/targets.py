"""Limits of each target: the numbers behind shared memory and occupancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def _nvidia(arch: int, block_kib: int, processor_kib: int) -> Target:
    """Limits from the CUDA C++ Programming Guide, "Compute Capabilities"."""
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        lanes=32,
        shared_per_block=block_kib * KIB,
        shared_per_processor=processor_kib * KIB,
        warps_per_processor=64,
        blocks_per_processor=32,
        registers_per_processor=65536,
        register_granule=256,
        reserved_shared=KIB,
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
)

TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 163, 164),
        _nvidia(90, 227, 228),
        _nvidia(100, 227, 228),
        _GFX942,
    )
}


def named(names: str) -> list[Target]:
    """The targets of a comma-separated list. Raises ValueError for one that is not known."""
    unknown = [name for name in names.split(",") if name not in TARGETS]
    if unknown:
        raise ValueError(f"unknown target {', '.join(unknown)}: choose among {', '.join(TARGETS)}")
    return [TARGETS[name] for name in names.split(",")]
