"""Groups of the base model's modules for the batched low-rank product.

One group is one wrapped module call in the model: a lone linear, or a fused one (q/k/v, gate/up)
whose members write side by side into one output. A module at the end of a sub-layer has further
groups for updates that read its output or the residual stream. Each expert of a layer is a group,
for each of its matrices; those of one parameter are neighbours. Knows shapes and names only.
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_store.canonical.canonical_adapter import ModuleKind, Source


@dataclass(frozen=True, slots=True)
class Member:
    """A module of the base model inside a group's output: columns [column, column + width)."""

    path: str  # e.g. "model.layers.0.self_attn.k_proj", as adapters name it
    column: int
    width: int


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """The modules that one call of the low-rank operation covers. All share the input."""

    index: int  # its row in the kernels' directory
    kind: ModuleKind
    in_features: int  # an embedding has its vocabulary
    out_features: int  # sum of the members' widths
    members: tuple[Member, ...]
    source: Source = "input"  # input of its updates
