"""Block sizes and launch options of lowrank's Triton kernels: pure functions of shape and device.

Chosen by what the compilers for sm_80, sm_90, sm_100 and gfx942 say of registers, shared memory and
load widths; few different ones, because each is compiled anew when it is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quickchange_kernels.lowrank.lowrank_tables import SMALL_TILE

MAX_PARTS = 8
MIN_PART = 1024  # features
COLUMNS = 128  # columns of y that one program of expand owns
EXPERT_COLUMNS = 256  # the same, of one row of experts


@dataclass(frozen=True)
class LowRankLaunch:
    """The constants and launch options of one kernel."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def parts(features: int) -> int:
    """Number of parts in which the features are summed, to keep a GPU busy with few rows."""
    return min(MAX_PARTS, -(-features // MIN_PART))


def shrink_launch(
    features: int, itemsize: int, height: int, most_pages: int, aligned: bool, hip: bool = False
) -> LowRankLaunch:
    """The launch of shrink for rows of `features` elements of `itemsize` bytes."""
    small = height == SMALL_TILE
    block = (512 if small else 128) // itemsize
    constants = {
        "HEIGHT": height,
        "PAGES": 2 if small else (4 if most_pages <= 4 else 8),
        "BLOCK_K": block,
        "PART": -(-features // (parts(features) * block)) * block,
        "EVEN_K": features % block == 0,
        "ALIGNED": aligned,
    }
    return LowRankLaunch(constants, num_warps=4, num_stages=2 if hip else 3)


def expand_launch(features: int | None, height: int, aligned: bool) -> LowRankLaunch:
    """The launch of expand. features: those of shrink's input; None for an embedding."""
    constants = {
        "HEIGHT": height,
        "PAGES": 4,
        "PARTS": 1 if features is None else parts(features),
        "BLOCK_N": COLUMNS,
        "ALIGNED": aligned,
    }
    return LowRankLaunch(constants, num_warps=4 if height == SMALL_TILE else 8, num_stages=1)


@dataclass(frozen=True)
class ExpertsLaunch:
    """The constants and launch options of both kernels for experts."""

    shrink: dict[str, Any]
    expand: dict[str, Any]
    pages: int  # of one program of shrink
    num_warps: int


def experts_launch(itemsize: int, aligned: bool) -> ExpertsLaunch:
    """The launches of the kernels for experts, for elements of `itemsize` bytes."""
    pages = 2
    return ExpertsLaunch(
        shrink={"PAGES": pages, "BLOCK_K": 512 // itemsize, "ALIGNED": aligned},
        expand={"PAGES": pages, "BLOCK_N": EXPERT_COLUMNS, "ALIGNED": aligned},
        pages=pages,
        num_warps=4,
    )
