"""linear_panels against float64, and bitwise the same whatever runs beside a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickchange_kernels.linear.linear_panels import (
    linear_panels,
    pack_panels,
    panel_rows,
    plain_linear_panels,
    reference_linear_panels,
    unpack_panels,
)

Linear = Callable[..., Tensor]
Close = Callable[[Tensor, Tensor], None]
SHAPES = [(64, 48), (1, 1), (100, 37), (577, 129), (200, 96), (131, 160), (3, 17), (129, 65)]


@pytest.fixture
def run(version: str) -> Linear:
    return plain_linear_panels if version == "plain" else linear_panels


def numbers(rows: int, features: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, features, generator=generator).to(dtype)


@pytest.mark.parametrize(("features", "width"), SHAPES)
def test_packing_loses_nothing(
    features: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = numbers(width, features, dtype, generator)
    panels = pack_panels(weight)
    assert torch.equal(unpack_panels(panels, width, features), weight)
    assert panels.nbytes < (width + 16) * (features + 1) * weight.itemsize


@pytest.mark.parametrize(("features", "width"), [(64, 48), (38, 16), (20, 96), (6, 112), (2, 80)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_are_read_out_of_panels(
    features: int,
    width: int,
    kind: torch.dtype,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    weight = numbers(width, features, dtype, generator)
    panels = pack_panels(weight)
    rows = torch.randint(width, (3, 50), generator=generator).to(kind)
    assert torch.equal(panel_rows(panels, rows, width), weight[rows.long()])
    assert torch.equal(panel_rows(panels, torch.arange(width), width), weight)


@pytest.mark.parametrize("width", [48, 64, 96])
@pytest.mark.parametrize("beyond", [0, 1, 1000, -97, -1000])
def test_a_row_that_the_weight_lacks_is_refused(width: int, beyond: int) -> None:
    panels = pack_panels(torch.randn(width, 6))
    row = torch.tensor([width + beyond])
    with pytest.raises(IndexError):
        panel_rows(panels, row, width)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 7, 8, 9, 16, 33, 65, 130])
@pytest.mark.parametrize(("features", "width"), SHAPES)
def test_every_shape_matches_float64(
    rows: int,
    features: int,
    width: int,
    run: Linear,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    x = numbers(rows, features, dtype, generator)
    panels = pack_panels(numbers(width, features, dtype, generator))
    out = run(x, panels, width)
    assert out.dtype == dtype
    assert out.shape == (rows, width)
    assert_close(out, reference_linear_panels(x, panels, width))


def test_a_bias_is_added(
    run: Linear, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    x = numbers(3, 70, dtype, generator)
    panels, bias = (
        pack_panels(numbers(101, 70, dtype, generator)),
        numbers(1, 101, dtype, generator),
    )
    out = run(x, panels, 101, bias[0])
    assert_close(out, reference_linear_panels(x, panels, 101, bias[0]))


def test_leading_dimensions_are_kept(run: Linear, generator: torch.Generator) -> None:
    panels = pack_panels(torch.randn(8, 16, generator=generator))
    x = torch.randn(2, 3, 16, generator=generator)
    assert run(x, panels, 8).shape == (2, 3, 8)
    assert run(x[0, 0], panels, 8).shape == (8,)


@pytest.mark.usefixtures("native_version")
def test_no_element_outside_the_rows_is_used(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    around = torch.full((7, 60), float("nan"), dtype=dtype)
    x = around[2:5, 20:53]
    x.copy_(numbers(3, 33, dtype, generator))
    panels = pack_panels(numbers(50, 33, dtype, generator))
    assert torch.isfinite(linear_panels(x, panels, 50)).all()
    turned = numbers(33, 5, dtype, generator).T
    assert torch.equal(linear_panels(turned, panels, 50), linear_panels(turned.clone(), panels, 50))


@pytest.mark.usefixtures("native_version")
@settings(
    max_examples=12,
    deadline=None,
    # the instruction set is the same for all examples
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    features=st.integers(1, 300),
    width=st.integers(1, 200),
    begin=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_rows_result_does_not_depend_on_the_batch(
    features: int, width: int, begin: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(features)
    x = numbers(140, features, dtype, generator)
    panels = pack_panels(numbers(width, features, dtype, generator))
    bias = numbers(1, width, dtype, generator)[0]
    alone = torch.cat([linear_panels(row, panels, width, bias) for row in x.split(1)])
    for rows in range(1, 71):
        own = slice(begin, begin + rows)
        assert torch.equal(linear_panels(x[own], panels, width, bias), alone[own]), rows
    assert torch.equal(linear_panels(x, panels, width, bias), alone)


@pytest.mark.usefixtures("native_version")
def test_threads_do_not_change_the_result(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, panels = numbers(5, 100, dtype, generator), pack_panels(numbers(777, 100, dtype, generator))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = linear_panels(x, panels, 777)
    torch.set_num_threads(3)
    three = linear_panels(x, panels, 777)
    torch.set_num_threads(before)
    assert torch.equal(one, three)


def test_panels_of_another_shape_are_refused(run: Linear, generator: torch.Generator) -> None:
    panels = pack_panels(torch.randn(40, 16, generator=generator))
    with pytest.raises(ValueError, match="768 elements are not the panels of a weight"):
        run(torch.zeros(2, 16), panels, 60)
    with pytest.raises(ValueError, match="are not the panels"):
        run(torch.zeros(2, 17), panels, 40)
