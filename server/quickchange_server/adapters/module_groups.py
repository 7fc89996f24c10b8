"""Groups of the base model's modules for the batched low-rank product.

One group is one wrapped module call in the model: a lone linear, or a fused one (q/k/v, gate/up)
whose members write side by side into one output. A module at the end of a sub-layer has further
groups for updates that read its output or the residual stream. Each expert of a layer is a group,
for each of its matrices; those of one parameter are neighbours. Knows shapes and names only.
"""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_store.canonical.canonical_adapter import ModuleKind, Source

Spans = tuple[tuple[int, int], ...]  # [begin, end) of each


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a module that this process computes, of several that hold the model together."""

    in_features: int  # of the whole module
    out_features: int
    inputs: Spans | None = None  # None: all; else the outputs are partial sums over the processes
    outputs: Spans | None = None  # None: all
    first: bool = True  # of the processes, one adds what may be added to a sum only once

    @property
    def leaves_sums(self) -> bool:
        """True if this process leaves to another what is added to the sum of all."""
        return self.inputs is not None and not self.first


@dataclass(frozen=True, slots=True)
class Member:
    """A module of the base model inside a group's output: columns [column, column + width)."""

    path: str  # e.g. "model.layers.0.self_attn.k_proj", as adapters name it
    column: int
    width: int
    shard: Shard | None = None  # None: this process computes all of the module
    spare: int = 0  # last inputs of an embedding, or outputs of an LM head, that no base has
    heads: int | None = None  # of a norm: its weight's outputs stand side by side so many times


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """The modules that one call of the low-rank operation covers. All share the input."""

    index: int  # its row in the kernels' directory
    kind: ModuleKind
    in_features: int  # an embedding has its vocabulary
    out_features: int  # sum of the members' widths
    members: tuple[Member, ...]
    source: Source = "input"  # input of its updates
