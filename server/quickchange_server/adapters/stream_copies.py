"""Copies to a CUDA device on a stream of their own, so that running steps are not held up.

The steps' stream never waits for a copy: the thread that copies does, and asleep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quickchange_server.adapters.copies import Mark


class StreamCopies:
    """`Copies` for one CUDA device. `cuda` is `torch.cuda`, or what stands in for it in a test."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    def mark(self) -> Mark:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event  # type: ignore[no-any-return]

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        with self._cuda.device(self._device), self._cuda.stream(self._stream):
            self._stream.wait_event(after)
            copy()
            arrived = self._cuda.Event(blocking=True)  # asleep: the engine needs the core
            arrived.record(self._stream)
        arrived.synchronize()
