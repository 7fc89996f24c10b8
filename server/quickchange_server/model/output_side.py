"""What adapters add behind a sub-layer: bottlenecks that read its output or the residual stream.

A sub-layer (attention, MLP) ends in one module, o_proj or down_proj, whose output y joins the
residual stream r that entered the sub-layer. Updates of that module may read y, r or y + r; each of
the three is a module group of its own, and all three see y as the updates of the module's input
left it. Where no adapter on the device has such updates, nothing is called and nothing kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from quickchange_kernels.lowrank import lowrank_
from quickchange_server.adapters.layout import ModuleGroup
from quickchange_server.model.fused_layer import FusedDecoderLayer
from quickchange_server.model.step import AdapterBatch, StepHolder
from quickchange_store.canonical import Source


class OutputSide:
    """The groups behind one sub-layer, and the residual stream that they may need."""

    def __init__(self, groups: dict[Source, ModuleGroup], holder: StepHolder) -> None:
        """`groups` always has "output"; the others only where `enter` will be called."""
        self._output = groups["output"].index
        residual, stream = groups.get("residual"), groups.get("stream")
        self._residual = None if residual is None else residual.index
        self._stream = None if stream is None else stream.index
        self._holder = holder
        self._entered: torch.Tensor | None = None  # [..., H], from the norm to the sub-layer's end

    def enter(self, stream: torch.Tensor) -> None:
        """Keep the residual stream [..., H] that enters the sub-layer, if some adapter reads it."""
        step = self._holder.step
        if step is None or step.adapters is None:
            return
        if _wanted(step.adapters, self._residual) or _wanted(step.adapters, self._stream):
            self._entered = stream

    def add_(self, y: torch.Tensor, adapters: AdapterBatch) -> None:
        """Add to the sub-layer's output y [T, H] what adapters make of it and of the stream."""
        tables, tokens = adapters.tables, adapters.tokens
        output, residual, stream = (
            group if _wanted(adapters, group) else None
            for group in (self._output, self._residual, self._stream)
        )
        entered, self._entered = self._entered, None
        if residual is None and stream is None:
            if output is not None:
                lowrank_(y, y, tables, tokens, output)
            return
        if entered is None:
            raise RuntimeError("an adapter reads a residual stream that the model did not show")
        entered = entered.reshape(-1, y.shape[-1])
        # Before the first of them writes: an adapter must not read another's addition.
        behind = None if stream is None else y + entered
        if output is not None:
            lowrank_(y, y, tables, tokens, output)
        if residual is not None:
            lowrank_(y, entered, tables, tokens, residual)
        if stream is not None and behind is not None:
            lowrank_(y, behind, tables, tokens, stream)


def _wanted(adapters: AdapterBatch, group: int | None) -> bool:
    """Whether some adapter on the device has updates in the group."""
    return group is not None and adapters.tables.shapes[group].most_pages > 0


def connect(model: nn.Module, entrances: Iterable[tuple[str, OutputSide]]) -> None:
    """Let each OutputSide see the input of its norm, given by path. After all fusing.

    A fused layer calls its norms' operations itself, and so has to tell.
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
