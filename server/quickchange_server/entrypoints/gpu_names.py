"""GPUs by the names that people give them, with their architecture and memory."""

from __future__ import annotations

from typing import NamedTuple


class NamedGpu(NamedTuple):
    """One model of GPU."""

    target: str  # its architecture, by its name in `gpu_targets`
    gib: float  # what a driver tells, less than the name says


GPUS = {
    "l4": NamedGpu("sm_89", 22.0),
    "a10": NamedGpu("sm_86", 22.1),
    "rtx3090": NamedGpu("sm_86", 23.6),
    "rtx4090": NamedGpu("sm_89", 23.6),
    "rtx5090": NamedGpu("sm_120", 31.4),
    "a100-40gb": NamedGpu("sm_80", 39.4),
    "l40s": NamedGpu("sm_89", 44.4),
    "a100-80gb": NamedGpu("sm_80", 79.1),
    "a100": NamedGpu("sm_80", 79.1),
    "h100": NamedGpu("sm_90", 79.1),
    "h200": NamedGpu("sm_90", 139.8),
    "b200": NamedGpu("sm_100", 178.3),
    "mi300x": NamedGpu("gfx942", 191.5),
    "mi300": NamedGpu("gfx942", 191.5),
}
