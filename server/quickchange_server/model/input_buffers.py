"""A step's small host tensors on their way to the device: packed in one buffer, in one copy.

Works on any tree of frozen dataclasses and tuples whose leaves are tensors, numbers or None: what
they mean is not known here. On a CPU nothing is packed or copied.

On a GPU the buffer is pinned, so that the copy does not hold up the host. Pinned memory comes from
torch's own cache, which hands a buffer out again only once the copies out of it are done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")

_ALIGNMENT = 16  # bytes: kernels may read the parts in vectors


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor's place in the buffer."""

    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a tree lies in one buffer, and all else that the tree says.

    Two trees with equal layouts differ in their tensors' values alone.
    """

    parts: tuple[Part, ...]
    order: tuple[int, ...]  # of each tensor leaf: its part. A tensor met twice is one part
    constants: tuple[object, ...]  # the other leaves
    nbytes: int


def layout_of(tree: object) -> tuple[Layout, list[Tensor]]:
    """The layout of a tree and the tensors of its parts."""
    parts: list[Part] = []
    tensors: list[Tensor] = []
    number: dict[int, int] = {}  # tensor's identity -> part
    order: list[int] = []
    constants: list[object] = []
    end = 0
    for leaf in _leaves(tree):
        if not isinstance(leaf, Tensor):
            constants.append(leaf)
            continue
        if id(leaf) not in number:
            number[id(leaf)] = len(parts)
            parts.append(Part(end, leaf.dtype, tuple(leaf.shape)))
            tensors.append(leaf)
            end += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
        order.append(number[id(leaf)])
    return Layout(tuple(parts), tuple(order), tuple(constants), end), tensors


def views(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """The parts' tensors on a buffer: uint8 [layout.nbytes]."""
    return [
        buffer[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
        for part in layout.parts
    ]


def rebuilt(tree: Tree, layout: Layout, tensors: list[Tensor]) -> Tree:
    """The same tree on other tensors, one for each part."""
    following = iter(layout.order)
    result: Tree = _replaced(tree, (tensors[part] for part in following))
    return result


def upload(tree: Tree, device: torch.device) -> Tree:
    """The tree on the device. On a CPU the tree itself."""
    if device.type == "cpu":
        return tree
    layout, tensors = layout_of(tree)
    host = packed(layout, tensors, device)
    return rebuilt(tree, layout, views(layout, host.to(device, non_blocking=True)))


def packed(layout: Layout, tensors: list[Tensor], device: torch.device) -> Tensor:
    """The tensors in one host buffer uint8 [layout.nbytes], pinned where the device needs it."""
    host = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
    for place, tensor in zip(views(layout, host), tensors, strict=True):
        place.copy_(tensor)
    return host


class StaticInputs:
    """A tree on a device buffer that stays where it is, as the inputs of a captured graph must."""

    def __init__(self, tree: object, device: torch.device) -> None:
        self._device = device
        self._layout, tensors = layout_of(tree)
        self._buffer = packed(self._layout, tensors, device).to(device, non_blocking=True)
        self._views = views(self._layout, self._buffer)

    def tree(self, like: Tree) -> Tree:
        """`like`, a tree of the same layout, on the buffer."""
        return rebuilt(like, self._layout, self._views)

    def refill(self, tree: object) -> None:
        """Other values of the same layout, behind all work given to the device so far.

        Raises ValueError where the layout differs: the graph would compute something else.
        """
        layout, tensors = layout_of(tree)
        if layout != self._layout:
            raise ValueError(f"inputs laid out as {layout} for a graph captured on {self._layout}")
        self._buffer.copy_(packed(layout, tensors, self._device), non_blocking=True)


def _leaves(tree: object) -> Iterator[object]:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, field.name))
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def _replaced(tree: Tree, tensors: Iterator[Tensor]) -> Tree:
    """The tree with its tensor leaves replaced in order."""
    if isinstance(tree, Tensor):
        return next(tensors)  # type: ignore[return-value]
    if isinstance(tree, tuple):
        return tuple(_replaced(item, tensors) for item in tree)  # type: ignore[return-value]
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    fields = dataclasses.fields(tree)
    return dataclasses.replace(
        tree, **{field.name: _replaced(getattr(tree, field.name), tensors) for field in fields}
    )
