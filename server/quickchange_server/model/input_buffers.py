"""Transfers of a step's small tensors: what it needs goes up in one copy, what it gives comes down
in one.

Works on any tree of dataclasses and tuples whose leaves are tensors, numbers or None, as pytree
walks them; does not know their meaning. On a CPU nothing is packed or copied.

On a GPU the host's buffers are pinned, so that no copy holds up the host. Pinned memory comes from
torch's own cache, which hands a buffer out again only once the copies from or to it are done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, register_dataclass, tree_flatten, tree_unflatten

Tree = TypeVar("Tree")
Other = TypeVar("Other")

_CPU = torch.device("cpu")
_ALIGNMENT = 16  # bytes; kernels may read the parts in vectors


@dataclass(frozen=True, slots=True)
class BufferPart:
    """One tensor's place in the buffer."""

    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BufferLayout(Generic[Tree]):
    """Places of a tree's tensors in one buffer, and the rest of the tree.

    Two trees of equal layout differ in their tensors' values alone.
    """

    parts: tuple[BufferPart, ...]
    places: tuple[tuple[int, int], ...]  # (leaf, part); a tensor met twice is one part
    constants: tuple[object, ...]  # the leaves, None in place of each tensor
    spec: TreeSpec
    nbytes: int


def layout_of(tree: Tree) -> tuple[BufferLayout[Tree], list[Tensor]]:
    """The layout of a tree and the tensors of its parts."""
    leaves, spec = _flat(tree)
    parts: list[BufferPart] = []
    tensors: list[Tensor] = []
    number: dict[int, int] = {}  # tensor's identity -> part
    places: list[tuple[int, int]] = []
    end = 0
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if id(leaf) not in number:
                number[id(leaf)] = len(parts)
                parts.append(BufferPart(end, leaf.dtype, tuple(leaf.shape)))
                tensors.append(leaf)
                end += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
            places.append((place, number[id(leaf)]))
            leaves[place] = None
    return BufferLayout(tuple(parts), tuple(places), tuple(leaves), spec, end), tensors


def views(layout: BufferLayout[Tree], buffer: Tensor) -> list[Tensor]:
    """Tensors of the parts as views of a buffer, uint8 [layout.nbytes]."""
    return [
        buffer[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
        for part in layout.parts
    ]


def rebuilt(layout: BufferLayout[Tree], tensors: list[Tensor]) -> Tree:
    """The tree with other tensors, one per part."""
    leaves = list(layout.constants)
    for place, part in layout.places:
        leaves[place] = tensors[part]
    tree: Tree = tree_unflatten(leaves, layout.spec)
    return tree


def upload(tree: Tree, device: torch.device) -> Tree:
    """The tree with its tensors on the device; on a CPU the tree itself."""
    if device.type == "cpu":
        return tree
    layout, tensors = layout_of(tree)
    host = packed(layout, tensors, device)
    return rebuilt(layout, views(layout, host.to(device, non_blocking=True)))


def packed(layout: BufferLayout[Tree], tensors: list[Tensor], device: torch.device) -> Tensor:
    """The tensors in one host buffer, uint8 [layout.nbytes], pinned for any device but a CPU."""
    size = layout.nbytes
    host = torch.empty(size, dtype=torch.uint8) if device.type == "cpu" else _pinned(size)
    _fill(views(layout, host), tensors)
    return host


class StaticInputs(Generic[Tree]):
    """A tree on a device buffer that stays where it is, as the inputs of a captured graph must.

    `host` is the same tree on the host, for the owner to write into before each `send`.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._device = device
        layout, tensors = layout_of(tree)
        self._written = packed(layout, tensors, _CPU)
        self.host = rebuilt(layout, views(layout, self._written))
        self._buffer = torch.empty_like(self._written, device=device)
        self.device = rebuilt(layout, views(layout, self._buffer))
        self._blank: Tensor | None = None
        self.send(())

    def keep_blank(self) -> None:
        """Keep what `host` holds now as inputs that change nothing, for `blank`."""
        self.send(())
        self._blank = self._buffer.clone()

    @contextmanager
    def blank(self) -> Iterator[None]:
        """The device holds the inputs that change nothing, if there are any, during the block."""
        if self._blank is not None:
            self._buffer.copy_(self._blank)
        yield
        self.send(())

    def send(self, others: Other) -> Other:
        """Copy what `host` holds, and `others`, which are returned on the device, in one transfer.

        They arrive behind all work given to the device so far.
        """
        layout, tensors = layout_of(others) if others else (None, [])
        if layout is None or not tensors:
            self._buffer.copy_(self._out(0), non_blocking=True)
            return others
        if self._device.type == "cpu":
            self._buffer.copy_(self._written)
            return others
        own = self._written.shape[0]
        host = self._out(layout.nbytes)
        _fill(views(layout, host[own:]), tensors)
        arrived = host.to(self._device, non_blocking=True)
        self._buffer.copy_(arrived[:own], non_blocking=True)
        return rebuilt(layout, views(layout, arrived[own:]))

    def _out(self, more: int) -> Tensor:
        """What `host` holds in memory that the device copies from, with room for `more` bytes."""
        if self._device.type == "cpu":
            return self._written
        own = self._written.shape[0]
        out = _pinned(own + more)
        out[:own].copy_(self._written)
        return out


class Download(Generic[Tree]):
    """A tree on its way from the device to the host, in one copy: as it is now, whatever is then
    done to its tensors."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        """Begin the copy, behind all work given to the device so far."""
        self._tree: Tree | None = None
        self._arrival: torch.cuda.Event | None = None
        layout, tensors = layout_of(tree)
        if device.type == "cpu":
            self._tree = rebuilt(layout, [tensor.clone() for tensor in tensors])
            return
        # The widest first: without gaps each begins at a multiple of its width.
        order = sorted(range(len(tensors)), key=lambda part: -layout.parts[part].dtype.itemsize)
        ends = list(accumulate([layout.parts[part].nbytes for part in order], initial=0))
        parts = list(layout.parts)
        for part, begin in zip(order, ends, strict=False):
            parts[part] = replace(parts[part], offset=begin)
        self._layout = replace(layout, parts=tuple(parts), nbytes=ends[-1])
        self._host = _pinned(ends[-1])
        if tensors:
            flat = [tensors[part].contiguous().view(-1).view(torch.uint8) for part in order]
            joined = flat[0] if len(flat) == 1 else torch.cat(flat)
            self._host.copy_(joined, non_blocking=True)
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def tree(self) -> Tree:
        """The tree on the host, once it has arrived: the host waits for this copy alone."""
        if self._tree is None:
            if self._arrival is not None:
                self._arrival.synchronize()
            self._tree = rebuilt(self._layout, views(self._layout, self._host))
        return self._tree


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _fill(places: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)


def _flat(tree: object) -> tuple[list[object], TreeSpec]:
    """Leaves of a tree; a dataclass met for the first time is registered with pytree."""
    leaves, spec = tree_flatten(tree)
    new = [kind for kind in {type(leaf) for leaf in leaves} if dataclasses.is_dataclass(kind)]
    for kind in new:
        register_dataclass(kind)
    return _flat(tree) if new else (leaves, spec)
