"""Adapter updates behind norms: gains and biases on what a norm gives.

An adapter that trains a norm's weight multiplies each of the norm's outputs, so its update is a
page of the kind GAIN on them, by the same operation as a linear's. A norm of attention heads has
one weight for all heads of a row, whose gain stands in the page once for each. If no adapter on the
device has pages for a norm, nothing is called for it.

Which rows a norm gives is found by the short pass; one that gives others has no group: no adapter
may update it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, Segments, lowrank_
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.model.forward_context import StepHolder
from quickchange_server.model.fusion import FusedDecoderLayer, FusedRMSNorm
from quickchange_server.model.rows_read import ASKED, TOKENS, Rows
from quickchange_store.base_model.norms import norm_weight, norms


@dataclass(frozen=True, slots=True)
class NormRows:
    """Rows of a step that a norm gives, and how many heads of its weight's width each has."""

    rows: Rows
    heads: int
    heads_first: bool = False  # the model gives [1, heads, T, width]; a fused one's rows are whole


class NormSide:
    """Module group behind one norm."""

    def __init__(self, group: ModuleGroup, rows: NormRows, holder: StepHolder) -> None:
        self._index = group.index
        self._width = group.out_features
        self._rows = rows.rows
        self._heads_first = rows.heads_first
        self._holder = holder
        self._tables: LowRankTables | None = None  # tables that `_used` was found in
        self._used = False  # some adapter on the device has pages in the group

    def add_(self, y: torch.Tensor) -> None:
        """Add the updates of the running step to the norm's output y [..., width]."""
        step = self._holder.step
        if step is None or step.adapters is None:
            return
        tables = step.adapters.tables
        if tables is not self._tables:
            self._tables, self._used = tables, bool(tables.shapes[self._index].most_pages)
        if not self._used:
            return
        segments: Segments = getattr(step.adapters, self._rows)
        whole = y.transpose(1, 2) if self._heads_first and y.dim() == 4 else y
        rows = whole.reshape(-1, self._width)
        lowrank_(rows, rows, tables, segments, self._index)
        if rows.data_ptr() != y.data_ptr():  # the rows did not lie side by side
            whole.copy_(rows.view(whole.shape))


@contextmanager
def noting_norms(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, NormRows]]:
    """The rows that each norm gives in a short pass during the block, by path, filled at its end.

    dtype: what the adapters' pages are in; norms that give another are left out.
    """
    shapes: dict[str, set[torch.Size | None]] = {}
    found: dict[str, NormRows] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            fits = isinstance(out, torch.Tensor) and out.dtype == dtype
            shapes.setdefault(path, set()).add(out.shape if fits else None)

        return hook

    weights = {path: norm_weight(module) for path, module in model.named_modules()}
    widths = {path: len(weight) for path, weight in weights.items() if weight is not None}
    hooks = [model.get_submodule(path).register_forward_hook(note(path)) for path in widths]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for path, seen in shapes.items():
        rows = _rows_of(next(iter(seen)), widths[path]) if len(seen) == 1 else None
        if rows is not None:
            found[path] = rows


def _rows_of(shape: torch.Size | None, width: int) -> NormRows | None:
    """What a norm gives by the shape of its output; None: no row for each of the pass's."""
    if shape is None or shape[-1] != width:
        return None
    inner = shape[1:] if shape[0] == 1 else shape
    if len(inner) == 2 and inner[0] in (TOKENS, ASKED):
        return NormRows("tokens" if inner[0] == TOKENS else "samples", 1)
    if len(inner) == 3 and TOKENS in inner[:2] and inner[0] != inner[1]:
        heads_first = inner[1] == TOKENS
        return NormRows("tokens", inner[0 if heads_first else 1], heads_first)
    return None


def norm_sides(
    model: nn.Module,
    rows: Mapping[str, NormRows],
    groups: list[ModuleGroup],
    holder: StepHolder,
) -> list[tuple[str, NormSide]]:
    """The side of each norm of these paths; their groups are added to `groups`."""
    sides = []
    for path, shape in norms(model).items():
        if (seen := rows.get(path)) is None:
            continue
        width = shape.out_features * seen.heads
        member = Member(path, 0, width, heads=seen.heads)
        groups.append(ModuleGroup(len(groups), "norm", width, width, (member,)))
        sides.append((path, NormSide(groups[-1], seen, holder)))
    return sides


def connect_norms(model: nn.Module, sides: Iterable[tuple[str, NormSide]]) -> None:
    """Let each norm, given by path, pass its output to its side. Call it after all fusing."""
    for path, side in sides:
        norm = model.get_submodule(path)
        if isinstance(norm, FusedRMSNorm):
            norm.follow = side.add_
        else:
            norm.forward = _followed(norm.forward, side.add_)
        layer = model.get_submodule(path.rpartition(".")[0])
        if isinstance(layer, FusedDecoderLayer):
            layer.take_norms()


def _followed(
    forward: Callable[..., torch.Tensor], add_: Callable[[torch.Tensor], None]
) -> Callable[..., torch.Tensor]:
    def followed(*args: Any, **named: Any) -> torch.Tensor:
        y = forward(*args, **named)
        add_(y)
        return y

    return followed
