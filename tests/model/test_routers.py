"""Routers take updates inside their own forward, and are left alone where none is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from quickchange_server.model.architectures import routers
from quickchange_server.model.architectures.routers import wrap_routers
from quickchange_server.model.forward_context import StepHolder


class Once(nn.Module):
    """A router as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor) -> Any:
        return functional.linear(x, self.weight).softmax(-1)


class Cast(Once):
    def forward(self, x: torch.Tensor) -> Any:
        return functional.linear(x.type(torch.float64), self.weight.type(torch.float64))


class Twice(Once):
    def forward(self, x: torch.Tensor) -> Any:
        return functional.linear(x, self.weight) + functional.linear(-x, self.weight)


class Apart(Once):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.einsum("te,ke->tk", x, self.weight)


def groups_of(router: Once) -> list[Any]:
    model = nn.ModuleDict({"gate": router})
    groups: list[Any] = []
    x = torch.randn(3, 8)
    wrap_routers(model, {"gate": router.weight}, StepHolder(), groups, lambda: router(x))
    return groups


@pytest.mark.parametrize("kind", [Once, Cast])
def test_a_router_with_one_product_of_its_weight_has_a_group(kind: type[Once]) -> None:
    (group,) = groups_of(kind())
    assert (group.in_features, group.out_features) == (8, 5)
    assert [member.path for member in group.members] == ["gate"]


@pytest.mark.parametrize("kind", [Twice, Apart])
def test_a_router_that_computes_otherwise_has_none_and_stays_as_it_is(kind: type[Once]) -> None:
    router = kind()
    assert groups_of(router) == []
    assert router.forward == kind.forward.__get__(router)


def test_a_step_without_adapters_runs_the_routers_own_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router, x = Once(), torch.randn(3, 8)
    expected = router(x)
    groups_of(router)
    monkeypatch.setattr(routers, "_Products", None)  # calling it would fail
    assert torch.equal(router(x), expected)
