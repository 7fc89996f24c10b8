"""Orders from the first rank to its followers, and their answers.

A follower holds its part of the model, of the caches and of every adapter on the device. It does
what the first rank does with its own parts, in the same order; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quickchange_server.adapters.packing import AdapterImage
from quickchange_server.engine.parallel.pass_inputs import PassLayout


@dataclass(frozen=True, slots=True)
class InstallCaches:
    """Take memory for keys and values, and for states."""

    num_blocks: int
    block_size: int
    state_rows: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class MakePool:
    """Take memory for adapters. named: other arguments of `DevicePool`."""

    budget_bytes: int
    dtype: torch.dtype
    named: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Allocate:
    """Take a slot and pages for an adapter. `image` has its layout alone, the same everywhere."""

    slot: int
    image: AdapterImage


@dataclass(frozen=True, slots=True)
class Write:
    """Read an adapter and write its pages beside the steps; answered by a `Written`."""

    slot: int
    digest: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Make a written slot visible to the steps from now on."""

    slot: int


@dataclass(frozen=True, slots=True)
class Free:
    """Give a slot and its pages back."""

    slot: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Take the inputs of a forward pass, which follow from device to device, and run it.

    graph: keep it as the captured graph of this number instead; None: run it once.
    """

    layout: PassLayout
    graph: int | None


@dataclass(frozen=True, slots=True)
class Replay:
    """Run the pass of a captured graph again, on new inputs."""

    graph: int


@dataclass(frozen=True, slots=True)
class Close:
    """End."""


Order = InstallCaches | MakePool | Allocate | Write | Publish | Free | Pass | Replay | Close


@dataclass(frozen=True, slots=True)
class Written:
    """A follower's answer to a `Write`. error: why it could not; None: it is done."""

    slot: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A follower's last words."""

    error: str


Answer = Written | Failed
