"""The one form in which every adapter is stored and served: a list of low-rank updates.

A canonical adapter is, per module of the base model, `A [r, in]`, `B [out, r]`, a scale and an
optional bias: the module's output y becomes y + w · (scale · B(A x) + bias), where w is the weight
that a request gives the adapter. Readers of other formats (PEFT, ...) produce this form; the engine
knows nothing else. Knows nothing of the store's layout on disk, of devices or of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

ModuleKind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class ModuleShape:
    """A module of the base model that an adapter may update."""

    kind: ModuleKind
    in_features: int  # an embedding's vocabulary
    out_features: int


@dataclass(frozen=True)
class BaseSpec:
    """What an adapter must fit: the base model's architecture and the shapes of its modules."""

    architecture: str  # transformers' class name, e.g. "LlamaForCausalLM"
    name: str  # informal; a different name alone only warns
    modules: dict[str, ModuleShape]  # by module path, e.g. "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class LowRankUpdate:
    """One module's update, in the dtype in which it was trained.

    Shapes: a [r, in], b [out, r], bias [out] or None. r may be 0 (bias only). For an embedding, x is
    the one-hot row of a token, so `A x` is a column of a [r, vocabulary].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True)
class CanonicalAdapter:
    """An adapter as the engine serves it. `updates` is keyed by the base model's module path."""

    architecture: str
    base_name: str  # as the source named it; informal
    updates: dict[str, LowRankUpdate]
    source: dict[str, Any] = field(default_factory=dict)  # format, recipe: informal, in the digest

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(
            u.a.numel() + u.b.numel() + (0 if u.bias is None else u.bias.numel())
            for u in self.updates.values()
        )

    @property
    def max_rank(self) -> int:
        return max((u.rank for u in self.updates.values()), default=0)
