"""Seconds between points of a step as the device passes them, read once all has been done."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Stopwatch(Protocol):
    def mark(self) -> None:
        """Note when the device gets here."""
        ...

    def seconds(self) -> list[float]:
        """Between each mark and the next. The device must have got to the last."""
        ...


class HostStopwatch:
    """Where work is done when the call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class CudaStopwatch:
    """Where the host runs ahead: events among the work."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        return [
            before.elapsed_time(after) / 1e3
            for before, after in zip(self._marks, self._marks[1:], strict=False)
        ]


def stopwatch(device: torch.device) -> Stopwatch:
    """One that suits the device."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
