"""Orders from the first rank to its followers, and how they travel.

A follower holds its part of the model, of the caches and of every adapter on the device. It does
what the first rank does with its own parts, in the same order; it decides nothing.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from quickchange_server.adapters.packing import AdapterImage


@dataclass(frozen=True, slots=True)
class InstallCaches:
    """Take memory for keys and values, and for states."""

    num_blocks: int
    block_size: int
    state_rows: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class MakePool:
    """Take memory for adapters; `args` are those of `DevicePool` between groups and device."""

    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Allocate:
    """Take a slot and pages for an adapter. `image` has the layout, the same everywhere, alone."""

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
    """Run a forward pass; graph: the key of the captured graph that it runs from."""

    inputs: Any
    adapters: bool
    graph: Hashable | None


@dataclass(frozen=True, slots=True)
class Close:
    """End."""


Order = InstallCaches | MakePool | Allocate | Write | Publish | Free | Pass | Close


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


class _Pickler(pickle.Pickler):
    """Host tensors as arrays: torch's own way puts each in a file of shared memory."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, Tensor):
            return _tensor, (obj.numpy(),)
        return NotImplemented


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)


def packed(message: Order | Answer) -> bytes:
    """The message as bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def receive(connection: Connection) -> Any:
    """The next message. Raises EOFError at the end of the channel."""
    return pickle.loads(connection.recv_bytes())
