"""Memory of the PTX executor: every access is checked for its bounds and its alignment."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

POISON = 0xFF  # what has not been written reads as NaN in every float type


class FaultError(RuntimeError):
    """The kernel did what a GPU would refuse, or what would have no defined result."""


def check_alignment(addresses: Array, size: int, text: str) -> None:
    """Every access of `size` bytes must be at a multiple of it."""
    if (addresses % np.uint64(size)).any():
        raise FaultError(f"misaligned access of {size} bytes: {text}")


class SharedMemory:
    """One block's. Not zeroed: it holds poison at first."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, POISON, np.uint8)

    def load(self, addresses: Array, size: int, text: str) -> Array:
        """[n, size] bytes."""
        loaded: Array = self.bytes[self._places(addresses, size, text)]
        return loaded

    def store(self, addresses: Array, data: Array, text: str) -> None:
        """Write [n, size] bytes."""
        self.bytes[self._places(addresses, data.shape[1], text)] = data

    def _places(self, addresses: Array, size: int, text: str) -> Array:
        check_alignment(addresses, size, text)
        start = (addresses & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if start.size and start.max() + size > self.bytes.size:
            raise FaultError(f"beyond the {self.bytes.size} bytes of shared memory: {text}")
        places: Array = start[:, None] + np.arange(size)
        return places


class GlobalMemory:
    """The storages of some CPU tensors, at their real addresses. Nothing else exists."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        spans = sorted((start, one.nbytes()) for start, one in storages.items() if one.nbytes())
        self.starts = np.array([start for start, _ in spans], np.uint64)
        self.ends = np.array([start + size for start, size in spans], np.uint64)
        self.buffers = [
            np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start))
            for start, size in spans
        ]

    def load(self, addresses: Array, size: int, text: str) -> Array:
        """[n, size] bytes."""
        out = np.empty((addresses.size, size), np.uint8)
        for buffer, chosen, places in self._places(addresses, size, text):
            out[chosen] = buffer[places]
        return out

    def store(self, addresses: Array, data: Array, text: str) -> None:
        """Write [n, size] bytes."""
        for buffer, chosen, places in self._places(addresses, data.shape[1], text):
            buffer[places] = data[chosen]

    def _places(self, addresses: Array, size: int, text: str) -> list[tuple[Array, Array, Array]]:
        """(buffer, which accesses, their bytes in it) for each storage that is touched."""
        check_alignment(addresses, size, text)
        owner = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (owner >= 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(owner, 0)])
        if not inside.all():
            raise FaultError(f"{int((~inside).sum())} accesses outside every tensor: {text}")
        found = []
        for number in np.unique(owner):
            chosen = owner == number
            offset = (addresses[chosen] - self.starts[number]).astype(np.int64)
            found.append((self.buffers[number], chosen, offset[:, None] + np.arange(size)))
        return found


class AsyncCopies:
    """cp.async of one thread: a copy lands when a wait forces it, the latest moment allowed, and
    its place in shared memory holds poison until then. So a missing wait shows in the result."""

    def __init__(self) -> None:
        self.open: list[tuple[int, int, int, int]] = []  # to, from, bytes of the place, bytes read
        self.groups: list[list[tuple[int, int, int, int]]] = []

    def commit(self) -> None:
        """Close the group of the copies begun since the last."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int, source: GlobalMemory, target: SharedMemory, text: str) -> None:
        """Let copies land until no more than `pending` groups are in flight."""
        while len(self.groups) > pending:
            for to, start, size, read in self.groups.pop(0):
                target.bytes[to : to + size] = 0
                if read:
                    data = source.load(np.array([start], np.uint64), read, text)
                    target.bytes[to : to + read] = data[0]
