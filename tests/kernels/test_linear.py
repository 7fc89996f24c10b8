"""linear against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.linear.linear_float import linear, plain_linear, reference_linear

Linear = Callable[..., Tensor]
Close = Callable[[Tensor, Tensor], None]
ROWS = [0, 1, 2, 3, 5, 8, 16, 33, 65]


@pytest.fixture
def run(version: str) -> Linear:
    return plain_linear if version == "plain" else linear


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


@pytest.mark.usefixtures("native_version")
@pytest.mark.parametrize(("features", "width"), [(576, 100), (131, 33), (7, 16)])
def test_a_rows_result_does_not_depend_on_the_batch(
    features: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(200, features, generator=generator).to(dtype)
    weight = torch.randn(width, features, generator=generator).to(dtype)
    alone = torch.cat([linear(row, weight) for row in x.split(1)])
    for rows in (2, 3, 4, 7, 8, 9, 16, 64, 65, 200):
        assert torch.equal(linear(x[:rows], weight), alone[:rows])


@pytest.mark.usefixtures("native_version")
def test_threads_do_not_change_the_result(generator: torch.Generator) -> None:
    x, weight = torch.randn(5, 100, generator=generator), torch.randn(777, 100, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = linear(x, weight)
    torch.set_num_threads(3)
    three = linear(x, weight)
    torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.usefixtures("native_version")
def test_no_element_outside_the_operands_is_used(generator: torch.Generator) -> None:
    room = torch.full((12, 50), float("nan"))
    weight = room[2:9, 10:43]
    weight.copy_(torch.randn(7, 33, generator=generator))
    around = torch.full((7, 60), float("nan"))
    x = around[2:5, 20:53]
    x.copy_(torch.randn(3, 33, generator=generator))
    assert torch.isfinite(linear(x, weight)).all()


@pytest.mark.usefixtures("native_version")
def test_a_dtype_without_a_native_version_goes_to_torch(generator: torch.Generator) -> None:
    x = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    assert torch.equal(linear(x, weight), plain_linear(x, weight))


@pytest.mark.usefixtures("native_version")
def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.zeros(2, 4), torch.zeros(3, 5))
