"""Inputs of a forward pass on their way from the first rank's device to the others'.

What the pass reads is known on the first rank's device alone: tokens that the step before sampled
never come to the host. So the tensors travel from device to device, all in one buffer, and only
where each one lies in it goes by the host. In captured graphs the buffer's journey is a part of the
graph. Tables of adapters do not travel: each rank has its own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables

_ALIGNMENT = 16  # bytes; kernels may read the parts in vectors


@dataclass(frozen=True, slots=True)
class PassLayout:
    """A tree of inputs without its tensors' values."""

    tree: bytes
    nbytes: int  # of the buffer


class _Flattener(pickle.Pickler):
    """Notes tensors in place of writing them."""

    def __init__(self, file: io.BytesIO, usual: LowRankTables | None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._usual = usual
        self._offsets: dict[int, int] = {}  # by the tensor's identity
        self.tensors: list[Tensor] = []
        self.nbytes = 0

    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, LowRankTables):
            return obj is self._usual
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._offsets:
            self._offsets[id(obj)] = self.nbytes
            self.tensors.append(obj)
            self.nbytes += _rounded(obj.nbytes)
        return self._offsets[id(obj)], obj.dtype, tuple(obj.shape)


class _Builder(pickle.Unpickler):
    """Finds tensors in a buffer."""

    def __init__(
        self, file: io.BytesIO, buffer: Tensor, tables: Callable[[bool], LowRankTables]
    ) -> None:
        super().__init__(file)
        self._buffer = buffer
        self._tables = tables

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, bool):
            return self._tables(pid)
        offset, dtype, shape = pid
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return self._buffer[offset : offset + nbytes].view(dtype).view(shape)


def flattened(tree: object, usual: LowRankTables | None) -> tuple[PassLayout, Tensor]:
    """The layout of a tree on a device, and a buffer there with its tensors' values.

    usual: the tables of steps without wide adapters; others are the wide ones.
    """
    file = io.BytesIO()
    flattener = _Flattener(file, usual)
    flattener.dump(tree)
    parts: list[Tensor] = []
    for tensor in flattener.tensors:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts.append(flat)
        if padding := _rounded(flat.numel()) - flat.numel():
            parts.append(flat.new_zeros(padding))
    return PassLayout(file.getvalue(), flattener.nbytes), torch.cat(parts)


def built(layout: PassLayout, buffer: Tensor, tables: Callable[[bool], LowRankTables]) -> Any:
    """The tree, with tensors that lie in the buffer. tables: the usual ones (True), or the wide."""
    return _Builder(io.BytesIO(layout.tree), buffer, tables).load()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
