"""Seam four: routers, whose logits take the adapters' updates inside transformers' own forward.

A router is no linear: it makes logits of its weight, then chooses experts by them, each model in a
way of its own. Its forward is run as it is, but where some adapter on the device updates it, under
a mode that sees the product with the router's weight, or with a cast of it, and adds to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, lowrank_
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.model.forward_context import AdapterBatch, StepHolder

_CASTS = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.type_as,
        torch.Tensor.float,
        torch.Tensor.bfloat16,
        torch.Tensor.half,
    }
)


def wrap_routers(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    holder: StepHolder,
    groups: list[ModuleGroup],
    run: Callable[[], None],
) -> None:
    """Let adapters update the routers of these paths; their groups are added to `groups`.

    run: a pass of the model over some tokens, without adapters. A router that it reaches, and that
    makes no product with its weight, or several, has no group: no adapter may update it.
    """
    found = {
        path: _Router(model.get_submodule(path), weight, holder) for path, weight in weights.items()
    }
    if not found:
        return
    run()
    for path, router in found.items():
        if router.products <= {1}:  # none at all: a layer that these tokens do not reach
            out_features, in_features = router.weight.shape
            member = Member(path, 0, out_features)
            group = ModuleGroup(len(groups), "router", in_features, out_features, (member,))
            groups.append(group)
            router.serve(group.index)
        else:
            router.remove()


class _Router:
    """A router's forward with adapters: in the place of the module's own."""

    def __init__(self, module: nn.Module, weight: torch.Tensor, holder: StepHolder) -> None:
        self.weight = weight
        self.products: set[int] = set()  # numbers of products of its calls, before `serve`
        self._module = module
        self._own: Callable[..., Any] = module.forward
        self._holder = holder
        self._group = 0
        self._tables: LowRankTables | None = None  # tables that `_used` was found in
        self._used = False  # some adapter on the device updates the router
        module.forward = self._count

    def serve(self, group: int) -> None:
        """Add the updates of this group from now on."""
        self._group = group
        self._module.forward = self._adapted

    def remove(self) -> None:
        """Leave the module as it was."""
        self._module.forward = self._own

    def _count(self, *args: Any, **named: Any) -> Any:
        seen: list[torch.Tensor] = []
        with _Products(self.weight, lambda _x, y: seen.append(y)):
            result = self._own(*args, **named)
        self.products.add(len(seen))
        return result

    def _adapted(self, *args: Any, **named: Any) -> Any:
        step = self._holder.step
        if step is None or step.adapters is None:
            return self._own(*args, **named)
        adapters = step.adapters
        if adapters.tables is not self._tables:
            self._tables = adapters.tables
            self._used = bool(adapters.tables.shapes[self._group].most_pages)
        if not self._used:
            return self._own(*args, **named)
        with _Products(self.weight, lambda x, y: _add_(y, x, adapters, self._group)):
            return self._own(*args, **named)


def _add_(y: torch.Tensor, x: torch.Tensor, adapters: AdapterBatch, group: int) -> None:
    """Add to y [..., N] the updates of x [..., K], both of the router's own dtype."""
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    lowrank_(y.view(-1, y.shape[-1]), inputs, adapters.tables, adapters.tokens, group)


class _Products(TorchFunctionMode):
    """Calls `see(x, y)` for every y = x Wᵀ (+ b) of one weight W, or of a cast of it."""

    def __init__(
        self, weight: torch.Tensor, see: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._weights = [weight]
        self._see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1 and self._is_weight(args[1]):
            self._see(args[0], out)
        elif func in _CASTS and self._is_weight(args[0]):
            self._weights.append(out)
        return out

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return any(tensor is weight for weight in self._weights)
