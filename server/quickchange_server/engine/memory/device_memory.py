"""What a device's memory holds: measured on CUDA, a stand-in in tests, none on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """A device's memory, shared with other processes. In bytes."""

    @property
    def total(self) -> int: ...

    def in_use(self) -> int:
        """What is in use, by anyone, once this process has given back what it can."""
        ...

    def growth(self, work: Callable[[], None]) -> int:
        """The most that `work` takes at a time, beyond what is in use before."""
        ...


class CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def in_use(self) -> int:
        gc.collect()  # captured graphs lie in cycles
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def growth(self, work: Callable[[], None]) -> int:
        self.in_use()
        # Reserved, not allocated: what lies between tensors is taken too.
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - before


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory that is to be divided; None on a CPU, where each part has a size of its own."""
    return CudaMemory(device) if device.type == "cuda" else None
