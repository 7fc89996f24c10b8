"""Upload of a step's small host tensors: packed in one buffer, sent in one copy.

Works on any tree of dataclasses and tuples whose leaves are tensors, numbers or None, as pytree
walks them; does not know their meaning. On a CPU nothing is packed or copied.

On a GPU the buffer is pinned, so that the copy does not hold up the host. Pinned memory comes from
torch's own cache, which hands a buffer out again only once the copies out of it are done.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, register_dataclass, tree_flatten, tree_unflatten

Tree = TypeVar("Tree")

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
    host = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
    for place, tensor in zip(views(layout, host), tensors, strict=True):
        place.copy_(tensor)
    return host


class StaticInputs(Generic[Tree]):
    """A tree on a device buffer that stays where it is, as the inputs of a captured graph must."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._device = device
        self._layout, tensors = layout_of(tree)
        self._buffer = packed(self._layout, tensors, device).to(device, non_blocking=True)
        self._views = views(self._layout, self._buffer)

    def tree(self) -> Tree:
        """The tree with its tensors in the buffer."""
        return rebuilt(self._layout, self._views)

    def refill(self, tree: Tree) -> None:
        """Copy other values of the same layout, behind all work given to the device so far.

        Raises ValueError if the layout differs: the graph would compute something else.
        """
        layout, tensors = layout_of(tree)
        if layout != self._layout:
            raise ValueError(f"inputs laid out as {layout} for a graph captured on {self._layout}")
        self._buffer.copy_(packed(layout, tensors, self._device), non_blocking=True)


def _flat(tree: object) -> tuple[list[object], TreeSpec]:
    """Leaves of a tree; a dataclass met for the first time is registered with pytree."""
    leaves, spec = tree_flatten(tree)
    new = [kind for kind in {type(leaf) for leaf in leaves} if dataclasses.is_dataclass(kind)]
    for kind in new:
        register_dataclass(kind)
    return _flat(tree) if new else (leaves, spec)
