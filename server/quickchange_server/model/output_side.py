"""Adapter updates behind a sub-layer, which read its output or the residual stream.

A sub-layer (attention, MLP) ends in one module, o_proj or down_proj, whose output y joins the
residual stream r that entered the sub-layer. Updates of that module may read y, r or y + r; each of
the three is a module group of its own, and all three see y as the updates of the module's input
left it. If no adapter on the device has such updates, nothing is called or kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, lowrank_
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.model.forward_context import AdapterBatch, StepHolder
from quickchange_server.model.fusion import FusedDecoderLayer
from quickchange_store.canonical.canonical_adapter import Source


class OutputSide:
    """Module groups behind one sub-layer, and the residual stream that they may need."""

    def __init__(self, groups: dict[Source, ModuleGroup], holder: StepHolder) -> None:
        """groups: always has "output"; the others only if `enter` will be called."""
        order: tuple[Source, ...] = ("output", "residual", "stream")
        self._groups = tuple(groups[source].index if source in groups else None for source in order)
        self._holder = holder
        self._tables: LowRankTables | None = None  # tables that `_used` was found in
        self._used: tuple[int | None, ...] | None = (
            None  # `_groups` with pages, else None; None: no group has any
        )
        self._entered: torch.Tensor | None = None  # [..., H], from the norm to the sub-layer's end

    def enter(self, stream: torch.Tensor) -> None:
        """Keep the residual stream [..., H] that enters the sub-layer, if some adapter reads it."""
        step = self._holder.step
        if step is None or step.adapters is None:
            return
        used = self._groups_in_use(step.adapters.tables)
        if used is not None and used[1:] != (None, None):
            self._entered = stream

    def add_(self, y: torch.Tensor, adapters: AdapterBatch) -> None:
        """Add to the sub-layer's output y [T, H] the updates that read it or the stream."""
        tables, tokens = adapters.tables, adapters.tokens
        used = self._groups_in_use(tables)
        if used is None:
            return
        output, residual, stream = used
        entered, self._entered = self._entered, None
        if residual is None and stream is None:
            if output is not None:
                lowrank_(y, y, tables, tokens, output)
            return
        if entered is None:
            raise RuntimeError("an adapter reads a residual stream that the model did not show")
        entered = entered.reshape(-1, y.shape[-1])
        # Before the first update writes: none may read another's addition.
        behind = None if stream is None else y + entered
        if output is not None:
            lowrank_(y, y, tables, tokens, output)
        if residual is not None:
            lowrank_(y, entered, tables, tokens, residual)
        if stream is not None and behind is not None:
            lowrank_(y, behind, tables, tokens, stream)

    def _groups_in_use(self, tables: LowRankTables) -> tuple[int | None, ...] | None:
        """Groups in which some adapter on the device has pages; kept until the tables change."""
        if tables is not self._tables:
            used = tuple(
                group if group is not None and tables.shapes[group].most_pages else None
                for group in self._groups
            )
            self._tables, self._used = tables, (None if used == (None,) * 3 else used)
        return self._used


def connect(model: nn.Module, entrances: Iterable[tuple[str, OutputSide]]) -> None:
    """Pass the input of each norm, given by path, to its OutputSide. Call it after all fusing.

    A fused layer calls its norms' operations itself, so it passes their inputs itself.
    """
    for path, side in entrances:
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(parent)
        if isinstance(layer, FusedDecoderLayer):
            layer.entrances[name] = side.enter
        else:
            layer.get_submodule(name).register_forward_pre_hook(_pre_hook(side))


def _pre_hook(side: OutputSide) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        side.enter(args[0])

    return hook
