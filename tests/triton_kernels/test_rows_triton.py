"""rms_norm, add_rms_norm, silu_mul and rotary_ in Triton, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.elementwise.rms_norm import (
    add_rms_norm,
    reference_add_rms_norm,
    reference_rms_norm,
    rms_norm,
)
from quickchange_kernels.elementwise.rotary import reference_rotary, rotary_
from quickchange_kernels.elementwise.silu_mul import reference_silu_mul, silu_mul

Close = Callable[[Tensor, Tensor], None]
WIDTHS = [1, 37, 576]


@pytest.fixture
def randn(
    generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Callable[..., Tensor]:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_of_strided_rows_matches_float64(
    width: int, offset: float, randn: Callable[..., Tensor], assert_close: Close
) -> None:
    x = randn(2, 5, width + 3)[..., 3:]
    weight = randn(width)
    assert_close(rms_norm(x, weight, 1e-5, offset), reference_rms_norm(x, weight, 1e-5, offset))


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_gives_the_sum_and_its_norm(
    width: int, randn: Callable[..., Tensor], assert_close: Close
) -> None:
    x, delta, weight = randn(6, width + 3)[:, 3:], randn(6, width), randn(width)
    total, normed = add_rms_norm(x, delta, weight, 1e-5)
    expected_total, expected = reference_add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected)


@pytest.mark.parametrize("width", [*WIDTHS, 1500])
def test_silu_mul_matches_float64(
    width: int, randn: Callable[..., Tensor], assert_close: Close
) -> None:
    x = randn(5, 2 * width + 3)[:, 3:] * 5
    assert_close(silu_mul(x), reference_silu_mul(x))


@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 32), (12, 10)])
@pytest.mark.parametrize(("q_heads", "k_heads"), [(3, 1), (9, 3)])
def test_rotary_turns_its_columns_and_touches_no_other(
    dim: int,
    rotated: int,
    q_heads: int,
    k_heads: int,
    randn: Callable[..., Tensor],
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    heads = q_heads + k_heads
    fused = randn(4, (heads + 1) * dim)
    before = fused.clone()
    q = fused[:, : q_heads * dim].view(4, q_heads, dim)
    k = fused[:, q_heads * dim : heads * dim].view(4, k_heads, dim)
    angle = torch.rand(4, rotated // 2, generator=generator).repeat(1, 2).to(fused.device) * 6
    cos, sin = angle.cos().to(fused.dtype), angle.sin().to(fused.dtype)
    expected = [reference_rotary(x, cos, sin) for x in (q, k)]
    rotary_(q, k, cos, sin)
    assert_close(q, expected[0])
    assert_close(k, expected[1])
    old = before[:, : heads * dim].view(4, heads, dim)
    new = fused[:, : heads * dim].view(4, heads, dim)
    assert torch.equal(new[..., rotated:], old[..., rotated:])
    assert torch.equal(fused[:, heads * dim :], before[:, heads * dim :])


def test_no_rows_are_no_work(device: torch.device) -> None:
    empty = torch.empty(0, 8, device=device)
    assert rms_norm(empty, torch.ones(8, device=device), 1e-5).shape == (0, 8)
    assert silu_mul(empty).shape == (0, 4)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, cos = torch.zeros(2, 1, 8, device=device), torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match="rotary: q"):
        rotary_(q, q.clone(), cos, cos)
    with pytest.raises(ValueError, match="add_rms_norm: x"):
        add_rms_norm(cos, cos[:2], cos[0], 1e-5)
