"""linear against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.linear import linear, plain_linear, reference_linear

Linear = Callable[..., Tensor]
Close = Callable[[Tensor, Tensor], None]
ROWS = [0, 1, 2, 3, 4, 5, 8, 13, 16, 24, 33]


@pytest.fixture(params=["plain", "dispatched"])
def run(request: pytest.FixtureRequest) -> Linear:
    return {"plain": plain_linear, "dispatched": linear}[request.param]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("features", "width"), [(64, 48), (1, 1), (100, 37), (577, 129)])
def test_every_shape_matches_float64(
    rows: int,
    features: int,
    width: int,
    run: Linear,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    x = torch.randn(rows, features, generator=generator).to(dtype)
    weight = torch.randn(width, features, generator=generator).to(dtype)
    out = run(x, weight)
    assert out.dtype == dtype
    assert out.shape == (rows, width)
    assert_close(out, reference_linear(x, weight))


def test_a_bias_is_added(
    run: Linear, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    x = torch.randn(3, 70, generator=generator).to(dtype)
    weight = torch.randn(50, 70, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype)
    assert_close(run(x, weight, bias), reference_linear(x, weight, bias))


def test_leading_dimensions_are_kept(run: Linear, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 16, generator=generator)
    weight = torch.randn(8, 16, generator=generator)
    assert run(x, weight).shape == (2, 3, 8)
    assert run(x[0, 0], weight).shape == (8,)


def test_inputs_may_be_strided(
    run: Linear, generator: torch.Generator, assert_close: Close
) -> None:
    x = torch.randn(5, 90, generator=generator)[:, 7:47]
    weight = torch.randn(12, 80, generator=generator)[:, 3:43]
    assert_close(run(x, weight), reference_linear(x, weight))
    turned = torch.randn(40, 5, generator=generator).T
    assert_close(run(turned, weight), reference_linear(turned, weight))
