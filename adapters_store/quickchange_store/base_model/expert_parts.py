"""Experts of a base model: parameters that hold one matrix for each expert of a layer.

Found by what transformers' seam for experts says of a module (`use_experts_implementation`), on any
device, the meta device included. Checkpoints and adapters of older versions have one module for
each expert; transformers' own conversions of weights say which part of which matrix that became.
Knows nothing of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import ExpertPart, ExpertPiece

if TYPE_CHECKING:
    from torch import nn

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_SEAM = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


def is_experts(module: Any) -> bool:
    """True for a module whose experts go through transformers' experts interface."""
    return all(hasattr(module, name) for name in _SEAM)


def expert_parts(network: nn.Module) -> dict[str, ExpertPart]:
    """The matrices of all experts, by the path of the parameter that holds them."""
    parts = {}
    for path, module in network.named_modules():
        if not is_experts(module):
            continue
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        for name, parameter in module.named_parameters(recurse=False):  # the order of PEFT, too
            if name not in names or parameter.ndim != 3:
                continue
            experts, first, second = parameter.shape
            parts[f"{path}.{name}"] = ExpertPart(
                experts=experts,
                in_features=first if module.is_transposed else second,
                out_features=second if module.is_transposed else first,
                interleaved=name == "gate_up_proj" and not module.is_concatenated,
            )
    return parts


def routers(network: nn.Module) -> dict[str, nn.Parameter]:
    """Weights [experts, in] of routers that are no plain linears, by the path of their module.

    They stand beside experts, or within a module that does. For an unwrapped model.
    """
    from torch import nn

    found = {}
    for path, module in network.named_modules():
        if not is_experts(module):
            continue
        block = path.rpartition(".")[0]
        for name, part in network.get_submodule(block).named_modules(prefix=block):
            weight = part._parameters.get("weight")
            if weight is None or weight.ndim != 2 or weight.dtype not in _float_types():
                continue
            plain = isinstance(part, nn.Linear) and not routed(name, part)
            if not (plain or isinstance(part, nn.Embedding) or name.startswith(f"{path}.")):
                found[name] = weight
    return found


def _float_types() -> tuple[Any, ...]:
    import torch

    return torch.float32, torch.bfloat16, torch.float16


def routed(path: str, linear: nn.Module) -> bool:
    """True for a linear that can't be wrapped: a router, or one of a single expert.

    A router makes more than a product of its input, by a forward of its own. An expert's module
    reads rows in an order that a router makes.
    """
    from torch import nn

    router = type(linear).forward is not nn.Linear.forward and "Router" in type(linear).__name__
    return router or "experts" in path.split(".")


@dataclass(frozen=True)
class ConvertedExperts:
    """What the modules of single experts became, by transformers' conversions of weights."""

    parts: Mapping[str, ExpertPart]
    renamings: Sequence[Any] = field(repr=False)
    converters: Sequence[Any] = field(repr=False)

    @classmethod
    def of(cls, network: Any, parts: Mapping[str, ExpertPart]) -> ConvertedExperts:
        """Those of a transformers model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        transforms = get_model_conversion_mapping(network) if parts else []
        return cls(
            parts=parts,
            renamings=[t for t in transforms if isinstance(t, WeightRenaming)],
            converters=[t for t in transforms if not isinstance(t, WeightRenaming)],
        )

    def module(self, path: str) -> str | None:
        """What the module `path` of an earlier version is called now, if it is whole."""
        from transformers.core_model_loading import rename_source_key

        parameter, pattern = rename_source_key(
            f"{path}.weight", list(self.renamings), list(self.converters)
        )
        return str(parameter).removesuffix(".weight") if pattern is None else None

    def find(self, path: str) -> ExpertPiece | None:
        """The piece that the module `path` of a single expert became; None for other paths."""
        from transformers.core_model_loading import rename_source_key

        if not self.parts or not (numbers := _NUMBER.findall(path)):
            return None
        parameter, pattern = rename_source_key(
            f"{path}.weight", list(self.renamings), list(self.converters)
        )
        part = self.parts.get(parameter)
        expert = int(numbers[-1])
        if part is None or pattern is None or expert >= part.experts:
            return None
        sources = next(
            list(converter.source_patterns)
            for converter in self.converters
            if pattern in converter.source_patterns
        )
        return ExpertPiece(parameter, expert, sources.index(pattern), len(sources))
