"""linear_quantized against float64 of the whole numbers that x and the weights become."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from quickchange_kernels.linear.linear_quantized import (
    PackedWeight,
    linear_quantized,
    pack_int4,
    pack_int8,
    plain_packed,
    quantize_activations,
    quantize_int4,
    reference_linear_quantized,
    unpacked,
)

Pack = Callable[[Tensor], PackedWeight]
Linear = Callable[..., Tensor]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # sums in float32, one rounding


@pytest.fixture(params=[pack_int8, pack_int4], ids=["int8", "int4"])
def pack(request: pytest.FixtureRequest) -> Pack:
    return request.param


@pytest.fixture
def run(version: str) -> Linear:
    return plain_packed if version == "plain" else linear_quantized


def error(out: Tensor, reference: Tensor) -> float:
    assert torch.isfinite(out).all()
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 13, 16, 17, 33, 70])
@pytest.mark.parametrize(("features", "width"), [(64, 48), (1, 1), (100, 37), (577, 129)])
def test_every_shape_matches_float64(
    rows: int,
    features: int,
    width: int,
    pack: Pack,
    run: Linear,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    x = torch.randn(rows, features, generator=generator).to(dtype)
    packed = pack(torch.randn(width, features, generator=generator))
    out = run(x, packed)
    assert out.dtype == dtype
    assert out.shape == (rows, width)
    assert error(out, reference_linear_quantized(x, packed, None)) < TOLERANCE[dtype]


def test_sums_of_a_group_are_the_whole_numbers_of_numpy(
    run: Linear, generator: torch.Generator
) -> None:
    """Scales of 1 leave the integers: any other product or sum would show."""
    x = torch.randint(-127, 128, (17, 32), generator=generator)
    x[:, 0] = 127  # so that a step is 1
    weight = torch.randint(-127, 128, (40, 32), generator=generator)
    weight[:, 5] = -127
    x[0], weight[0] = 127, 127  # the largest sums there are
    x[1], weight[1] = 127, -127
    expected = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    assert np.array_equal(run(x.float(), pack_int8(weight.float())).numpy(), expected)


def test_int4_sums_are_the_whole_numbers_of_numpy(run: Linear, generator: torch.Generator) -> None:
    x = torch.randint(-127, 128, (17, 64), generator=generator)
    x[:, ::32] = 127
    whole = torch.randint(0, 16, (40, 64), generator=generator)
    packed = pack_int4(whole.float())
    packed = PackedWeight(
        packed.weight, torch.ones_like(packed.scale), torch.zeros_like(packed.scale), 40
    )
    held = unpacked(packed, 64, torch.float32).numpy().astype(np.int64)
    assert held.min() == 0
    assert held.max() == 15
    expected = x.numpy().astype(np.int64) @ held.T
    assert np.array_equal(run(x.float(), packed).numpy(), expected)


def test_activations_become_the_integers_of_the_plain_version(
    run: Linear, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A column that picks one feature shows its integer, once the scales are taken out."""
    x = (torch.randn(50, 64, generator=generator) * 3).to(dtype).float()
    x[0, :32] = torch.arange(32) + 0.5  # many ties
    x[0, 0] = 127.0
    whole, scale = quantize_activations(x)
    found = run(x, pack_int8(torch.eye(64) * 127))
    integers = (found / 127).view(50, 2, 32) / scale.unsqueeze(-1)
    assert (integers - whole).abs().max() < 1e-4


def test_a_bias_is_added(
    pack: Pack, run: Linear, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(3, 70, generator=generator).to(dtype)
    packed = pack(torch.randn(50, 70, generator=generator))
    bias = torch.randn(50, generator=generator).to(dtype)
    reference = reference_linear_quantized(x, packed, bias)
    assert error(run(x, packed, bias), reference) < TOLERANCE[dtype]


def test_leading_dimensions_are_kept_and_inputs_may_be_strided(
    pack: Pack, run: Linear, generator: torch.Generator
) -> None:
    x = torch.randn(2, 3, 90, generator=generator)[..., 7:47]
    packed = pack(torch.randn(12, 40, generator=generator))
    assert run(x, packed).shape == (2, 3, 12)
    assert error(run(x, packed), reference_linear_quantized(x, packed, None)) < 2e-6
    turned = torch.randn(40, 5, generator=generator).T
    assert error(run(turned, packed), reference_linear_quantized(turned, packed, None)) < 2e-6


@pytest.mark.usefixtures("native_version")
@pytest.mark.parametrize(("features", "width"), [(576, 100), (131, 33), (7, 16)])
def test_a_rows_result_does_not_depend_on_the_batch(
    features: int, width: int, pack: Pack, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(70, features, generator=generator).to(dtype)
    packed = pack(torch.randn(width, features, generator=generator))
    alone = torch.cat([linear_quantized(row, packed) for row in x.split(1)])
    for rows in range(1, 71):
        assert torch.equal(linear_quantized(x[:rows], packed), alone[:rows]), rows
        assert torch.equal(linear_quantized(x[-rows:], packed), alone[-rows:]), rows


@pytest.mark.usefixtures("native_version")
def test_many_rows_are_the_same_as_few(pack: Pack, generator: torch.Generator) -> None:
    x = torch.randn(600, 96, generator=generator)
    packed = pack(torch.randn(40, 96, generator=generator))
    few = torch.cat([linear_quantized(rows, packed) for rows in x.split(7)])
    assert torch.equal(linear_quantized(x, packed), few)


def test_rows_of_zeros_give_zeros(pack: Pack, run: Linear, generator: torch.Generator) -> None:
    packed = pack(torch.randn(20, 64, generator=generator))
    assert (run(torch.zeros(3, 64), packed) == 0).all()
    assert (run(torch.full((3, 64), 1e-38), packed) == 0).all()


def test_an_outlier_costs_its_own_group_alone(run: Linear, generator: torch.Generator) -> None:
    x = torch.randn(2, 64, generator=generator)
    x[:, 3] = 1e30
    packed = pack_int8(torch.cat([torch.zeros(20, 32), torch.ones(20, 32)], 1))
    exact = x[:, 32:].double().sum(1, keepdim=True)
    assert (run(x, packed).double() - exact).abs().max() < 0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_what_is_no_number_is_nan_and_others_are_as_without_it(
    value: float, pack: Pack, run: Linear, generator: torch.Generator
) -> None:
    x = torch.randn(18, 70, generator=generator)
    packed = pack(torch.randn(20, 70, generator=generator))
    expected = run(x, packed)
    x[5, 40] = value
    out = run(x, packed)
    assert out[5].isnan().all()
    others = torch.arange(18) != 5
    assert torch.equal(out[others], expected[others])


@pytest.mark.usefixtures("native_version")
def test_float16_goes_to_the_plain_version(pack: Pack, generator: torch.Generator) -> None:
    x = torch.randn(3, 20, generator=generator).half()
    packed = pack(torch.randn(5, 20, generator=generator))
    assert torch.equal(linear_quantized(x, packed), plain_packed(x, packed))


@pytest.mark.usefixtures("native_version")
def test_parts_that_do_not_fit_are_refused(pack: Pack, generator: torch.Generator) -> None:
    packed = pack(torch.randn(5, 64, generator=generator))
    with pytest.raises(RuntimeError):
        linear_quantized(torch.zeros(2, 128), packed)
    narrow = PackedWeight(packed.weight, packed.scale[:, :1].contiguous(), None, 5)
    with pytest.raises(RuntimeError):
        linear_quantized(torch.zeros(2, 96), narrow)


def test_int4_weights_are_nearer_than_by_the_ends_of_their_range(
    generator: torch.Generator,
) -> None:
    weight = torch.randn(40, 96, generator=generator)
    groups = weight.view(40, 3, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    by_ends = ((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low
    whole, scale, minimum = quantize_int4(weight)
    found = whole * scale.unsqueeze(-1).float() + minimum.unsqueeze(-1).float()

    def cost(held: Tensor) -> float:
        return float((held - groups).square().sum())

    assert cost(found) < 0.95 * cost(by_ends)


def test_groups_of_one_value_are_kept(generator: torch.Generator) -> None:
    for value in (0.0, 1.0, -2.5):
        held = unpacked(pack_int4(torch.full((3, 64), value)), 64, torch.float32)
        assert (held == value).all()
    weight = torch.randn(20, 64, generator=generator)
    assert unpacked(pack_int4(weight), 64, torch.float64).shape == (20, 64)


def test_weights_that_are_not_finite_are_refused(pack: Pack) -> None:
    with pytest.raises(ValueError, match="no number can't be kept as int"):
        pack(torch.tensor([[1.0, float("nan")]]))
