"""How adapters' pages reach the device beside the steps that run there.

Two orders must hold. Pages that were freed may still be read by steps given to the device before:
a copy into them waits for these. And what is published to later steps must have arrived: a copy is
reported as done only then. On a CPU everything happens at once, so both hold by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in the device's work: all that it was given before."""


class Copies(Protocol):
    """Runs copies to one device. `mark` on the engine's thread, `run` on any other."""

    def mark(self) -> Mark:
        """Now."""

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        """Run `copy` behind `after` and return when what it copied is on the device."""


class ImmediateCopies:
    """Where the host's memory is the device's."""

    def mark(self) -> Mark:
        return self

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        del after  # has happened
        copy()


def copies_for(device: torch.device) -> Copies:
    """The way that suits the device."""
    if device.type != "cuda":
        return ImmediateCopies()
    from quickchange_server.adapters.stream_copies import StreamCopies

    return StreamCopies(device)
