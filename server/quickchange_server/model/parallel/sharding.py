"""This rank's part of a model that transformers cut: plain modules, and where ranks add up.

transformers reads this rank's slices of the weights as distributed tensors, with hooks that add up
or gather. Until linears are wrapped the model runs with those. `localised` then makes the slices
plain parameters and takes the hooks out; each linear that was cut gets a `Joint`, by which the
module in its place does what the hook did, with the adapters' updates of its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quickchange_server.adapters.module_groups import Shard, Spans
from quickchange_server.model.parallel.ranks import Ranks
from quickchange_server.model.parallel.sharding_plan import (
    COLUMNS,
    GATHERED,
    ROWS,
    SPLIT,
    SUMMED,
    style_of,
)


@dataclass(frozen=True)
class Joint:
    """What the ranks do together around one linear that was cut."""

    shard: Shard
    ranks: Ranks
    split: bool = False  # each rank takes its own inputs out of whole ones
    gathered: bool = False  # the outputs are needed whole

    def own(self, x: Tensor) -> Tensor:
        """This rank's inputs [..., k] of what the module is given."""
        if not self.split or self.shard.inputs is None:
            return x
        ((begin, end),) = self.shard.inputs
        return x[..., begin:end]

    def whole(self, y: Tensor, widths: Sequence[int]) -> Tensor:
        """The module's output, given this rank's [..., n]: partial sums, which it may overwrite, or
        columns; widths: of the linears that stand side by side in them."""
        if self.shard.inputs is not None:
            self.ranks.sum_(y)
        elif self.gathered:
            every = [torch.split(part, list(widths), dim=-1) for part in self.ranks.gather(y)]
            return torch.cat([each for of_all in zip(*every, strict=True) for each in of_all], -1)
        return y

    def fits(self, other: Joint | None) -> bool:
        """True if both linears may be computed as one."""
        return other is not None and (self.split, self.gathered, self.shard.inputs) == (
            other.split,
            other.gathered,
            other.shard.inputs,
        )

    def widened(self, widths: Sequence[int]) -> list[int]:
        """Widths of the outputs after `whole`."""
        return [width * self.ranks.size if self.gathered else width for width in widths]


class JointLinear(nn.Module):
    """A linear that was cut, where no adapter updates it."""

    def __init__(self, base: nn.Module, joint: Joint, widths: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self._joint = joint
        self._widths = tuple(widths)

    @property
    def weight(self) -> Tensor:
        """This rank's weight, whose dtype or device some models read."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(self._joint.own(x))
        return self._joint.whole(y, self._widths)


@dataclass(frozen=True)
class Sharding:
    """What was cut of one model: linears by their paths, experts' parameters by theirs."""

    joints: Mapping[str, Joint] = field(default_factory=dict)
    experts: Mapping[str, Shard] = field(default_factory=dict)


UNCUT = Sharding()


def localised(model: nn.Module, ranks: Ranks) -> Sharding:
    """Make the rank's slices of `model` plain parameters, and take transformers' hooks out."""
    plan: Mapping[str, str] = model.tp_plan  # type: ignore[assignment]
    joints: dict[str, Joint] = {}
    experts: dict[str, Shard] = {}
    for path, module in model.named_modules():
        style = style_of(path, plan)
        if style is not None:
            vars(module).pop("forward", None)
        shards = {
            name: _shard_of(parameter, ranks, bool(getattr(module, "is_transposed", False)))
            for name, parameter in module._parameters.items()
            if isinstance(parameter, DTensor)
        }
        for name in shards:
            _make_local(module, name)
        if isinstance(module, nn.Linear) and style in COLUMNS | ROWS:
            shard = shards["weight"]
            module.out_features, module.in_features = module.weight.shape
            if shard.leaves_sums:
                module.register_parameter("bias", None)
            joints[path] = Joint(shard, ranks, style in SPLIT, style in GATHERED)
        elif style in SUMMED:
            for name, shard in shards.items():
                experts[f"{path}.{name}"] = shard
                bias = module._parameters.get(f"{name}_bias")
                if bias is not None and shard.leaves_sums:
                    bias.data = torch.zeros_like(bias)
            module.forward = partial(_summed, type(module).forward, module, ranks)
    return Sharding(joints, experts)


def _summed(forward: Callable[..., Tensor], module: nn.Module, ranks: Ranks, *args: Any) -> Tensor:
    out = forward(module, *args).contiguous()
    ranks.sum_(out)
    return out


def _make_local(module: nn.Module, name: str) -> None:
    parameter: Any = module._parameters[name]
    local = parameter.to_local().detach().contiguous()
    module._parameters[name] = nn.Parameter(local, requires_grad=False)


def _shard_of(parameter: DTensor, ranks: Ranks, transposed: bool) -> Shard:
    """The part of a weight [..., out, in], or [..., in, out], or of a bias, that is this rank's."""
    sizes = (1, *parameter.shape)[-2:]
    spans: list[Spans | None] = [None, None]
    for placement in parameter.placements:
        if placement.is_replicate():
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        pieces = getattr(placement, "split_factor", 1)
        spans[dim % parameter.ndim - parameter.ndim] = _own_spans(
            parameter.shape[dim], pieces, ranks
        )
    (out_features, in_features), (outputs, inputs) = sizes, spans
    if transposed:
        out_features, in_features, outputs, inputs = in_features, out_features, inputs, outputs
    return Shard(in_features, out_features, inputs, outputs, ranks.rank == 0)


def _own_spans(length: int, pieces: int, ranks: Ranks) -> Spans:
    """This rank's share of each of `pieces` equal pieces of a dimension."""
    piece = length // pieces
    share = piece // ranks.size
    begins = [number * piece + ranks.rank * share for number in range(pieces)]
    return tuple((begin, begin + share) for begin in begins)


@contextmanager
def made_whole(model: nn.Module) -> Iterator[None]:
    """The model as one process would hold it: a module's slices are gathered while it runs."""
    own = [module for module in model.modules() if _is_cut(module)]
    hooked = [(module, vars(module).pop("forward", None)) for module in own]
    for module in own:
        module.forward = partial(_gathered, type(module).forward, module)
    try:
        yield
    finally:
        for module, forward in hooked:
            vars(module).pop("forward")
            if forward is not None:
                module.forward = forward


def _is_cut(module: nn.Module) -> bool:
    """True if transformers cut the module's own parameters, or hooked it."""
    cut = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
    return cut or bool(getattr(module, "_is_hooked", False))


def _gathered(forward: Callable[..., Any], module: nn.Module, *args: Any, **named: Any) -> Any:
    slices = dict(module._parameters)
    try:
        for name, parameter in slices.items():
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor().detach()
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
        return forward(module, *args, **named)
    finally:
        module._parameters.update(slices)
