"""Block sizes and launch options of lowrank's Triton kernels: pure functions of shape and device.

Chosen by what the compilers say of registers, shared memory and load widths. Of what changes at run
time only a tile's height decides here, and it has two values: each configuration is compiled ahead.
"""

from __future__ import annotations

from typing import Any

import torch

from quickchange_kernels.launch_config import LaunchConfig
from quickchange_kernels.lowrank.lowrank_tables import SMALL_TILE, columns_of, parts_of

EXPERT_COLUMNS = 256  # columns that one program owns of one row of experts
EXPERT_PAGES = 2  # pages of one program of shrink for experts
BUSY_PROGRAMS = 528  # four on each multiprocessor of an H100


def shrink_config(
    features: int, dtype: torch.dtype, height: int, *, aligned: bool, dependent: bool
) -> LaunchConfig:
    """The launch of shrink for rows of `features` elements."""
    small = height == SMALL_TILE
    block = (512 if small else 128) // dtype.itemsize
    constants = {
        "K": features,
        "HEIGHT": height,
        "PAGES": 2 if small else 8,
        "BLOCK_K": block,
        "PART": -(-features // (parts_of(features) * block)) * block,
        "ALIGNED": aligned,
        "DEPENDENT": dependent,
    }
    return LaunchConfig(constants, num_warps=4, num_stages=3)


def expand_config(
    features: int | None, height: int, *, aligned: bool, dependent: bool
) -> LaunchConfig:
    """The launch of expand. features: those of shrink's input; None for an embedding.

    dependent: it starts while shrink runs, so it is False for an embedding.
    """
    small = height == SMALL_TILE
    constants = {
        "HEIGHT": height,
        "PAGES": 4,
        "PARTS": 1 if features is None else parts_of(features),
        "BLOCK_N": columns_of(SMALL_TILE if features is None else height),
        "ALIGNED": aligned,
        "DEPENDENT": dependent,
    }
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    if dependent and not small:
        options["maxnreg"] = 255  # for sm_100 the compiler hopes for two programs, and spills
    return LaunchConfig(constants, num_warps=4 if small else 8, options=options)


def experts_configs(dtype: torch.dtype, *, aligned: bool) -> tuple[LaunchConfig, LaunchConfig]:
    """The launches of shrink and expand for experts."""
    common = {"PAGES": EXPERT_PAGES, "ALIGNED": aligned}
    return (
        LaunchConfig(common | {"BLOCK_K": 512 // dtype.itemsize}, num_warps=4),
        LaunchConfig(common | {"BLOCK_N": EXPERT_COLUMNS}, num_warps=4),
    )


def chunk_programs(most_pages: int, pages: int, others: int) -> int:
    """Programs over the chunks of `pages` pages of a piece, each of which takes every n-th chunk.

    One for each chunk that the widest resident adapter can have, unless the `others` programs
    beside them keep the GPU busy: most adapters have far fewer pages, and a program that finds
    none costs its start.
    """
    return max(1, min(-(-most_pages // pages), -(-BUSY_PROGRAMS // others)))
