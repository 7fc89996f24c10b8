"""Seam three: transformers' experts interface, batched over (token, expert) pairs, with adapters.

A router gives each token some experts; every pair is one row. All experts' products of a layer are
one operation, and so are the adapters' updates of them: a row takes the pages that its token's
adapter has for the row's expert (each expert is a module group of its own). Rows stay in the order
of tokens, so nothing is sorted, and no value of the device is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from quickchange_kernels.linear.linear_experts import linear_experts
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, lowrank_experts_
from quickchange_server.adapters.module_groups import Member, ModuleGroup, Shard
from quickchange_server.model.forward_context import StepHolder
from quickchange_server.model.parallel.sharding import UNCUT, Sharding
from quickchange_store.base_model.expert_parts import expert_parts
from quickchange_store.canonical.canonical_adapter import ExpertPart, expert_path

NAME = "quickchange"
_ATTRIBUTE = "quickchange_experts"


def wrap_experts(
    model: nn.Module,
    holder: StepHolder,
    groups: list[ModuleGroup],
    *,
    adapters: bool,
    sharding: Sharding = UNCUT,
) -> None:
    """Let all experts of the interface compute by this one; their groups are added to `groups`."""
    ExpertsInterface.register(NAME, _interface)
    parts = {path: part for path, part in expert_parts(model).items() if _is_plain(model, path)}
    products: dict[str, list[_Product]] = {}
    for parameter, part in parts.items():
        path, _, name = parameter.rpartition(".")
        shard = sharding.experts.get(parameter)
        own = _groups_of(parameter, part, len(groups), shard) if adapters else []
        groups += own
        indices = range(own[0].index, own[0].index + len(own)) if own else None
        product = _Product(model.get_submodule(path), name, holder, indices)
        products.setdefault(path, []).append(product)
    for path, both in products.items():
        experts: Any = model.get_submodule(path)
        setattr(experts, _ATTRIBUTE, tuple(both))
        experts.config._experts_implementation = NAME


def _is_plain(model: nn.Module, path: str) -> bool:
    """True for a parameter of floats; experts that are stored quantised compute by themselves."""
    return model.get_parameter(path).dtype in (torch.float32, torch.bfloat16, torch.float16)


def _groups_of(
    parameter: str, part: ExpertPart, first: int, shard: Shard | None
) -> list[ModuleGroup]:
    size = (part.in_features, part.out_features)
    return [
        ModuleGroup(
            first + expert,
            "expert",
            *size,
            (Member(expert_path(parameter, expert), 0, part.out_features, shard),),
        )
        for expert in range(part.experts)
    ]


class _Product:
    """One of the matrices of a layer's experts, and the adapters' updates of it."""

    def __init__(
        self, module: nn.Module, name: str, holder: StepHolder, groups: range | None
    ) -> None:
        weight: torch.Tensor = getattr(module, name)
        if module.is_transposed and weight.device.type == "cpu":
            # The same matrices, laid out so that a row of outputs' weights is contiguous.
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        self._weight = weight
        self._transposed = bool(module.is_transposed)
        self._bias = getattr(module, f"{name}_bias") if module.has_bias else None
        self._holder = holder
        self._groups = groups
        self._tables: LowRankTables | None = None  # tables that `_used` was found in
        self._used = False  # some adapter on the device updates an expert

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, choices: int) -> torch.Tensor:
        """x [T, K] or [T · choices, K], expert [T · choices] to [T · choices, N]."""
        weight = self._weight.transpose(1, 2) if self._transposed else self._weight
        y = linear_experts(x, weight, self._bias, expert)
        step = self._holder.step
        if step is not None and step.adapters is not None and self._groups is not None:
            tables = step.adapters.tables
            if tables is not self._tables:
                self._tables = tables
                self._used = any(tables.shapes[group].most_pages for group in self._groups)
            if self._used:
                tokens = step.adapters.tokens
                lowrank_experts_(y, x, expert, choices, tables, tokens, self._groups)
        return y


def _interface(
    module: Any,
    hidden_states: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, choices]
    top_k_weights: torch.Tensor,  # [T, choices]
) -> torch.Tensor:
    """The experts of one layer, in the calling convention of transformers."""
    tokens, choices = top_k_index.shape
    expert = top_k_index.reshape(-1)
    enter, leave = getattr(module, _ATTRIBUTE)
    inner = enter(hidden_states, expert, choices)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = leave(inner, expert, choices)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    weighted: torch.Tensor = (out * top_k_weights.reshape(-1, 1)).view(tokens, choices, -1)
    return weighted.sum(1).to(hidden_states.dtype)
