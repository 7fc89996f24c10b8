"""rms_norm and silu_mul against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels.rms_norm import plain_rms_norm, reference_rms_norm, rms_norm
from quickchange_kernels.silu_mul import plain_silu_mul, reference_silu_mul, silu_mul

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
