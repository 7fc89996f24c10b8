"""rms_norm, add_rms_norm, silu_mul and rotary_ against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.elementwise.rms_norm import (
    add_rms_norm,
    plain_add_rms_norm,
    plain_rms_norm,
    reference_add_rms_norm,
    reference_rms_norm,
    rms_norm,
)
from quickchange_kernels.elementwise.rotary import plain_rotary_, reference_rotary, rotary_
from quickchange_kernels.elementwise.silu_mul import plain_silu_mul, reference_silu_mul, silu_mul

Close = Callable[[Tensor, Tensor], None]
WIDTHS = [1, 8, 37, 576]


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_matches_float64(
    width: int,
    offset: float,
    version: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    run = plain_rms_norm if version == "plain" else rms_norm
    x = randn(2, 70, width + 3, generator=generator, dtype=dtype)[..., 3:]
    weight = randn(width, generator=generator, dtype=dtype)
    out = run(x, weight, 1e-5, offset)
    assert out.shape == x.shape
    assert_close(out, reference_rms_norm(x, weight, 1e-5, offset))


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_gives_the_sum_and_its_norm(
    width: int, version: str, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    run = plain_add_rms_norm if version == "plain" else add_rms_norm
    x = randn(70, width + 3, generator=generator, dtype=dtype)[:, 3:]
    delta = randn(70, width, generator=generator, dtype=dtype)
    weight = randn(width, generator=generator, dtype=dtype)
    total, normed = run(x, delta, weight, 1e-5)
    expected_total, expected = reference_add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected)


@pytest.mark.usefixtures("native_version")
def test_add_rms_norm_refuses_two_shapes() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="add_rms_norm: x"):
        add_rms_norm(x, x[:2], x[0], 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul_matches_float64(
    width: int, version: str, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    run = plain_silu_mul if version == "plain" else silu_mul
    x = randn(70, 2 * width + 3, generator=generator, dtype=dtype)[:, 3:] * 5
    out = run(x)
    assert out.shape == (70, width)
    assert_close(out, reference_silu_mul(x))


def test_silu_mul_of_large_gates_neither_overflows_nor_vanishes(version: str) -> None:
    run = plain_silu_mul if version == "plain" else silu_mul
    x = torch.tensor([[500.0, -500.0, 0.0, 2.0, 2.0, 2.0]])
    assert run(x).tolist() == [[1000.0, 0.0, 0.0]]


@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 32), (12, 10), (256, 256)])
def test_rotary_matches_float64_and_leaves_the_other_columns(
    dim: int,
    rotated: int,
    version: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    run = plain_rotary_ if version == "plain" else rotary_
    fused = randn(9, 6 * dim, generator=generator, dtype=dtype)
    before = fused.clone()
    q, k = (t.view(9, -1, dim) for t in (fused[:, : 3 * dim], fused[:, 3 * dim : 5 * dim]))
    angle = torch.rand(9, rotated // 2, generator=generator).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    expected = [reference_rotary(x, cos, sin) for x in (q, k)]
    run(q, k, cos, sin)
    assert_close(q, expected[0])
    assert_close(k, expected[1])
    assert torch.equal(q[..., rotated:], before[:, : 3 * dim].view(9, 3, dim)[..., rotated:])
    assert torch.equal(fused[:, 5 * dim :], before[:, 5 * dim :])


@pytest.mark.usefixtures("native_version")
def test_rotary_refuses_shapes_that_do_not_fit() -> None:
    q, cos = torch.zeros(2, 1, 8), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="rotary: q"):
        rotary_(q, q.clone(), cos, cos)
