"""Loader thread that does the slow part of moving adapters, job by job in order of arrival.

Knows nothing of adapters: it runs functions and returns their outcomes. `Pacer` gives the thread
pauses beside running steps. `Copies` run on it and must keep two orders. A copy into freed pages
waits for the steps that were given to the device before and may still read them. And a copy is
reported as done only once it has arrived, so that what is published to later steps is there. On a
CPU both hold by themselves. On a CUDA device copies have a stream of their own: the copying thread
waits for it, asleep; the steps' stream never does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")

_SLICE = 0.0005  # seconds of work between two pauses, and of each pause


class Pacer:
    """Called between pieces of work, pauses after every half millisecond while `busy()` is true.

    The engine's threads wait for each other many times a step, so a thread that keeps one of their
    cores holds them all up; on half a core, in short slices, it does so for as long as a slice.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._since = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._since < _SLICE:
            return
        if self._busy():
            time.sleep(_SLICE)
        self._since = time.monotonic()


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A job's outcome: its result, or the error that it raised."""

    tag: str
    result: T | None
    error: Exception | None
    seconds: float


class Loader(Generic[T]):
    """Runs jobs on one thread of its own, which calls `on_done` after each."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self._jobs: SimpleQueue[tuple[str, Callable[[], T]] | None] = SimpleQueue()
        self._done: SimpleQueue[Done[T]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def submit(self, tag: str, job: Callable[[], T]) -> None:
        """Queue a job; `tag` names it in its outcome."""
        self._jobs.put((tag, job))

    def finished(self) -> list[Done[T]]:
        """The jobs that ended since the last call, in order."""
        done: list[Done[T]] = []
        while True:
            try:
                done.append(self._done.get_nowait())
            except Empty:
                return done

    def close(self) -> None:
        """Wait for the running job, drop those behind it, and end the thread."""
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._done.put(self._one(*job))
            del job  # frees what the job holds: an adapter's tensors
            self._on_done()

    def _one(self, tag: str, job: Callable[[], T]) -> Done[T]:
        started = time.monotonic()
        try:
            result = job()
        except Exception as error:  # any error is this adapter's failure, not the loader's
            return Done(tag, None, error, time.monotonic() - started)
        return Done(tag, result, None, time.monotonic() - started)


class Mark(Protocol):
    """A point in the device's work: behind all that it was given before."""


class Copies(Protocol):
    """Runs copies to one device. `mark` on the engine's thread, `run` on any other."""

    def mark(self) -> Mark:
        """The present point."""

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        """Run `copy` behind `after`; return once its data is on the device."""


class ImmediateCopies:
    """`Copies` for a device that shares the host's memory."""

    def mark(self) -> Mark:
        return self

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        del after  # has been reached already
        copy()


class StreamCopies:
    """`Copies` for one CUDA device. cuda: `torch.cuda`, or its stand-in in a test."""

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


def copies_for(device: torch.device) -> Copies:
    """The `Copies` that suit the device."""
    return StreamCopies(device) if device.type == "cuda" else ImmediateCopies()
