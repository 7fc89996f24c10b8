"""Checkpoints of a training run: one file, replaced whole, read only by the same run.

The file holds a fingerprint of recipe and data, which decides what the same run is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from quickchange_training.errors import OutputError

_FILE = "checkpoint.pt"


def fingerprint(*parts: object) -> str:
    """Short hash of parts that are JSON or convert to str; equal parts have equal hashes."""
    encoded = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


def unsaved(step: int, state: object) -> None:
    """What follows a step of a run without checkpoints."""


class _HeldError(Exception):
    """Ends a run whose state is saved, before the signal that asked for it is raised again."""


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """The signals that ask for the end, kept until the block ends; at once if one comes again."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held  # signals are the main thread's
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if held:
            restore()
            signal.raise_signal(number)
        held.append(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hold)
    try:
        yield held
    except _HeldError:
        restore()
        signal.raise_signal(held[0])
        raise KeyboardInterrupt from None  # its handler has only taken note
    finally:
        restore()
    if held:  # behind the last step
        signal.raise_signal(held[0])


@dataclass(frozen=True)
class Checkpoints:
    """Folder, interval and fingerprint of one run's checkpoints."""

    folder: Path
    run: str  # fingerprint
    every: int  # optimizer steps

    @contextmanager
    def saving(self) -> Iterator[Callable[[int, Callable[[], Mapping[str, Any]]], None]]:
        """A function to call after each step, with its number and what gives the state then.

        It saves where a checkpoint is due, and where SIGINT or SIGTERM has come during the step.
        That signal is then raised again, for whoever handled it before.
        """
        with _signals_held() as held:

            def stepped(step: int, state: Callable[[], Mapping[str, Any]]) -> None:
                if held or step % self.every == 0:
                    self.save(state())
                if held:
                    raise _HeldError

            yield stepped

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; a crash leaves the old one or the new one."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{_FILE}.partial"
        try:
            with scratch.open("wb") as file:
                torch.save({"run": self.run, "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.folder / _FILE)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    def load(self) -> dict[str, Any] | None:
        """The state last saved, None where there is none.

        Raises OutputError where it is another run's.
        """
        import torch

        path = self.folder / _FILE
        if not path.exists():
            return None
        found = torch.load(path, weights_only=True)
        if found["run"] != self.run:
            raise OutputError(
                f"{path} is a checkpoint of another recipe or other data; remove the folder to "
                "start afresh"
            )
        state: dict[str, Any] = found["state"]
        return state
