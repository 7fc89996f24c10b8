"""Seam two: wrapped linears and embeddings that add the batch's adapter segments.

A wrapper calls the base module and, only if some row of the step has an adapter, adds the low-rank
products in place. A lone linear is one group of the low-rank operation; a fused one (q/k/v,
gate/up) is one group with several members.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from quickchange_kernels import native
from quickchange_kernels.linear.linear_float import linear, linear_fixed
from quickchange_kernels.linear.linear_panels import (
    PANEL_DTYPES,
    fills_panels,
    linear_panels,
    pack_panels,
    panel_rows,
)
from quickchange_kernels.lowrank.lowrank_contract import Segments, lowrank_, lowrank_embedding_
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.model.forward_context import AdapterBatch, StepHolder
from quickchange_server.model.parallel.sharding import Joint
from quickchange_server.model.quantized_linear import has_hooks, is_plain, shape_only
from quickchange_server.model.rows_read import Rows
from quickchange_store.base_model.weight_reading import give_back_freed, release

if TYPE_CHECKING:  # output_side imports fusion, which imports this module
    from quickchange_server.model.output_side import OutputSide


class BaseLinear(nn.Module):
    """A plain `nn.Linear` through `linear`, on the same weight.

    deterministic: by the product that sums in one order whatever the rows are.
    """

    def __init__(self, base: nn.Linear, *, deterministic: bool = False) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._operands = (base.weight, base.bias)
        self._product = linear_fixed if deterministic else linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, *self._operands)


class PackedLinear(nn.Module):
    """A plain `nn.Linear` whose weight is kept in panels alone.   x [..., K], y [..., N]."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        give_back_freed()  # what linears before this one left
        self.panels: torch.Tensor
        self.register_buffer("panels", pack_panels(weight))
        self.bias = base.bias
        self.weight = shape_only(weight)  # models ask for its shape, dtype or device
        self._operands = (self.panels, weight.shape[0], base.bias)
        release(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_panels(x, *self._operands)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] of the weight, by their numbers, int [...]."""
        return panel_rows(self.panels, numbers, self.weight.shape[0])


def base_linear(
    module: nn.Module, *, deterministic: bool = False, rows_read: bool = True
) -> nn.Module:
    """The fastest module that computes exactly what `module` does (quantised linears stay).

    rows_read: somebody else reads rows of the weight, which therefore stays as it is.
    """
    if not is_plain(module):
        return module
    linear: nn.Linear = module  # type: ignore[assignment]
    if not rows_read and packs(linear.weight):
        return PackedLinear(linear)
    return BaseLinear(linear, deterministic=deterministic)


def packs(weight: torch.Tensor) -> bool:
    """True if the native kernels serve a linear with this weight, and its panels are no larger."""
    on_cpu = weight.device.type == "cpu" and weight.dtype in PANEL_DTYPES
    return on_cpu and fills_panels(weight) and native.ensure()


def tied_embedding(model: nn.Module) -> nn.Embedding | None:
    """The input embedding, if it and the LM head are plain and one matrix that is nobody else's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or not is_plain(head) or "forward" in vars(embedding):
        return None
    holders = {
        module
        for module in model.modules()
        if any(p is head.weight for p in module._parameters.values())
    }
    return embedding if holders == {embedding, head} and embedding.max_norm is None else None


def take_rows(embedding: nn.Embedding, head: PackedLinear) -> None:
    """Let the embedding that is tied to an LM head read its rows out of the head's panels."""
    del embedding.weight
    embedding.weight = head.weight
    embedding.forward = head.rows  # type: ignore[assignment,method-assign]


def sharing_weights(model: nn.Module) -> set[nn.Module]:
    """Modules one of whose parameters is another's, too."""
    holders = Counter(
        parameter for module in model.modules() for parameter in module._parameters.values()
    )
    return {
        module
        for module in model.modules()
        if any(p is not None and holders[p] > 1 for p in module._parameters.values())
    }


class AdaptedLinear(nn.Module):
    """y = base(x) + Σ over segments of weight · scale · (x Aᵀ) B.   x [..., K], y [..., N].

    joint: what the ranks do together around a linear that was cut.
    """

    def __init__(
        self,
        base: nn.Module,
        group: ModuleGroup,
        rows: Rows,
        holder: StepHolder,
        joint: Joint | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self._compute_base = base if has_hooks(base) else base.forward
        self._index = group.index
        self._rows = rows
        self._holder = holder
        self._joint = joint
        self.output_side: OutputSide | None = None  # if the module ends a sub-layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, whose dtype or device some models read."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias, which some models add themselves."""
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._joint is not None:
            x = self._joint.own(x)
        y: torch.Tensor = self._compute_base(x)
        adapters = _adapters(self._holder)
        if adapters is not None:
            segments: Segments = getattr(adapters, self._rows)
            rows = y.view(-1, y.shape[-1])
            # State-space layers give columns transposed.
            inputs = x.reshape(-1, x.shape[-1]).contiguous()
            lowrank_(rows, inputs, adapters.tables, segments, self._index)
        if self._joint is not None:
            y = self._joint.whole(y, [member.width for member in self.group.members])
        if adapters is not None and self.output_side is not None:
            self.output_side.add_(y.view(-1, y.shape[-1]), adapters)
        return y


class AdaptedEmbedding(nn.Module):
    """y = base(ids) + Σ over segments of weight · scale · A[:, ids] B.   ids [..., T].

    The update's scale includes the factor of an embedding that scales its output (Gemma's).
    """

    def __init__(self, base: nn.Embedding, group: ModuleGroup, holder: StepHolder) -> None:
        super().__init__()
        self.base = base
        self.group = group
        self._holder = holder

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(ids)
        adapters = _adapters(self._holder)
        if adapters is not None:
            lowrank_embedding_(
                y.view(-1, y.shape[-1]),
                ids.reshape(-1),
                adapters.tables,
                adapters.tokens,
                self.group.index,
                self.group.in_features,
            )
        return y


class SharedProjection(nn.Module):
    """One linear computed once for several modules that read the same input.

    Each part passes its own input; the product is computed if the input is a new one and kept until
    the last part has taken its columns, so that a model that calls the parts apart stays right.
    """

    def __init__(self, projection: nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.projection = projection
        self.widths = widths
        self.compute = projection.forward  # all the parts' columns: [..., sum of widths]
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input:
            self._outputs = self.compute(x).split(self.widths, dim=-1)
            self._input = x
        out = self._outputs[index]
        if index == len(self.widths) - 1:
            self._input, self._outputs = None, ()
        return out


class ProjectionPart(nn.Module):
    """The module in the place of one of the fused linears."""

    def __init__(self, shared: SharedProjection, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.shared.projection.weight  # type: ignore[assignment]
        begin = sum(self.shared.widths[: self.index])
        return weight[begin : begin + self.shared.widths[self.index]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self.index, x)


def _adapters(holder: StepHolder) -> AdapterBatch | None:
    return None if holder.step is None else holder.step.adapters
