"""GPUs by the names that people give them: architecture, memory and rates.

The rates are those of the makers' data sheets: dense 16-bit products with float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple


class NamedGpu(NamedTuple):
    """One model of GPU."""

    target: str  # its architecture, by its name in `gpu_targets`
    gib: float  # what a driver tells, less than the name says
    bandwidth: float  # bytes/s of its memory
    operations: float  # a second


GPUS = {
    "l4": NamedGpu("sm_89", 22.0, 300e9, 121e12),
    "a10": NamedGpu("sm_86", 22.1, 600e9, 125e12),
    "rtx3090": NamedGpu("sm_86", 23.6, 936e9, 71e12),
    "rtx4090": NamedGpu("sm_89", 23.6, 1008e9, 165e12),
    "rtx5090": NamedGpu("sm_120", 31.4, 1792e9, 209e12),
    "a100-40gb": NamedGpu("sm_80", 39.4, 1555e9, 312e12),
    "l40s": NamedGpu("sm_89", 44.4, 864e9, 362e12),
    "a100-80gb": NamedGpu("sm_80", 79.1, 2039e9, 312e12),
    "a100": NamedGpu("sm_80", 79.1, 2039e9, 312e12),
    "h100": NamedGpu("sm_90", 79.1, 3350e9, 989e12),
    "h200": NamedGpu("sm_90", 139.8, 4800e9, 989e12),
    "b200": NamedGpu("sm_100", 178.3, 8000e9, 2250e12),
    "mi300x": NamedGpu("gfx942", 191.5, 5300e9, 1307e12),
    "mi300": NamedGpu("gfx942", 191.5, 5300e9, 1307e12),
}
