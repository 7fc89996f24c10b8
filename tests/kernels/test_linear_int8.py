"""linear_int8 against float64 of the weights that its int8 stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.linear.linear_int8 import (
    GROUP,
    dequantize_int8,
    linear_int8,
    plain_linear_int8,
    quantize_int8,
    reference_linear_int8,
)

Linear = Callable[..., Tensor]


@pytest.fixture
def run(version: str) -> Linear:
    return plain_linear_int8 if version == "plain" else linear_int8


def error(out: Tensor, reference: Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 16, 33, 65, 130])
@pytest.mark.parametrize(("features", "width"), [(64, 48), (1, 1), (100, 37), (577, 129)])
def test_every_shape_matches_float64(
    rows: int,
    features: int,
    width: int,
    run: Linear,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    x = torch.randn(rows, features, generator=generator).to(dtype)
    weight, scale = quantize_int8(torch.randn(width, features, generator=generator))
    out = run(x, weight, scale)
    assert out.dtype == dtype
    assert out.shape == (rows, width)
    assert error(out, reference_linear_int8(x, weight, scale)) < 1e-2


def test_a_bias_is_added(run: Linear, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(3, 70, generator=generator).to(dtype)
    weight, scale = quantize_int8(torch.randn(50, 70, generator=generator))
    bias = torch.randn(50, generator=generator).to(dtype)
    reference = reference_linear_int8(x, weight, scale, bias)
    assert error(run(x, weight, scale, bias), reference) < 1e-2


def test_leading_dimensions_are_kept_and_inputs_may_be_strided(
    run: Linear, generator: torch.Generator
) -> None:
    x = torch.randn(2, 3, 90, generator=generator)[..., 7:47]
    weight, scale = quantize_int8(torch.randn(12, 40, generator=generator))
    assert error(run(x, weight, scale), reference_linear_int8(x, weight, scale)) < 1e-2
    turned = torch.randn(40, 5, generator=generator).T
    assert error(run(turned, weight, scale), reference_linear_int8(turned, weight, scale)) < 1e-2


@pytest.mark.usefixtures("native_version")
@pytest.mark.parametrize(("features", "width"), [(576, 100), (131, 33), (7, 16)])
def test_a_rows_result_does_not_depend_on_the_batch(
    features: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(130, features, generator=generator).to(dtype)
    weight, scale = quantize_int8(torch.randn(width, features, generator=generator))
    alone = torch.cat([linear_int8(row, weight, scale) for row in x.split(1)])
    for rows in (2, 3, 4, 7, 16, 64, 65, 130):
        assert torch.equal(linear_int8(x[:rows], weight, scale), alone[:rows])


@pytest.mark.usefixtures("native_version")
def test_float16_goes_to_the_plain_version(generator: torch.Generator) -> None:
    x = torch.randn(3, 20, generator=generator).half()
    weight, scale = quantize_int8(torch.randn(5, 20, generator=generator))
    assert torch.equal(linear_int8(x, weight, scale), plain_linear_int8(x, weight, scale))


@pytest.mark.usefixtures("native_version")
def test_scales_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    weight, scale = quantize_int8(torch.randn(5, 64, generator=generator))
    with pytest.raises(RuntimeError):
        linear_int8(torch.zeros(2, 64), weight, scale[:, :1].contiguous())


def test_no_weight_is_further_off_than_half_a_step(generator: torch.Generator) -> None:
    weight = torch.randn(40, 100, generator=generator) * torch.logspace(-20, 20, 40)[:, None]
    quantized, scale = quantize_int8(weight)
    steps = scale.float().repeat_interleave(GROUP, dim=1)[:, :100]
    off = (dequantize_int8(quantized, scale, torch.float32) - weight).abs()
    # the scale is rounded to bfloat16, so the largest weight may fall beyond ±127 steps by 0.25
    assert (off <= 0.76 * steps).all()


def test_a_group_of_zeros_stays_zero() -> None:
    quantized, scale = quantize_int8(torch.zeros(2, 33))
    assert (dequantize_int8(quantized, scale, torch.float32) == 0).all()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="no number can't be kept as int8"):
        quantize_int8(torch.tensor([[1.0, float("nan")]]))
