"""Copies on the host that start no second thread: in pieces, with a pause after each.

Knows nothing of what is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import A_ALIGNMENT
from quickchange_server.errors import AdapterFailedError

PIECE = 32_768  # elements of one copy: torch uses several threads above this

Pause = Callable[[], None]


def no_pause() -> None:
    """Do not pause: nothing else needs the processor."""


def aligned(elements: int, dtype: torch.dtype) -> int:
    """`elements` of `dtype`, rounded up to a multiple of 64 bytes."""
    unit = A_ALIGNMENT // dtype.itemsize
    return -(-elements // unit) * unit


def copy_in_pieces(target: Tensor, source: Tensor, pause: Pause) -> None:
    """target [n, m] = source [n, m], n at least 1 and far below PIECE.

    Raises AdapterFailedError where float16, alone narrower in range than what the store takes, has
    no room for a number.
    """
    step = PIECE // target.shape[0]
    for begin in range(0, target.shape[1], step):
        piece = target[:, begin : begin + step]
        piece.copy_(source[:, begin : begin + step])
        if piece.dtype is torch.float16 and not bool(piece.isfinite().all()):
            raise AdapterFailedError(
                "it has numbers beyond float16, in which adapters are held: set --adapter-dtype "
                "bfloat16 or float32"
            )
        pause()
