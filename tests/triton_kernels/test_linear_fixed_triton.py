"""linear_fixed in Triton: the contract, for few rows, more, and many, in splits and in one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from quickchange_kernels.linear.linear_fixed_triton import launch_linear_fixed, splits_of
from quickchange_kernels.linear.linear_float import linear_fixed, reference_linear

Close = Callable[[Tensor, Tensor], None]


def drawn(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [1, 16, 17, 65, 130])
@pytest.mark.parametrize(("features", "outputs"), [(2048, 72), (2100, 65), (40, 200)])
def test_it_computes_the_contract(
    rows: int,
    features: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    x = drawn(generator, rows, features, dtype=dtype)
    weight = drawn(generator, outputs, features, dtype=dtype) / features**0.5
    bias = drawn(generator, outputs, dtype=dtype) if rows % 2 else None
    out = launch_linear_fixed(
        x.to(device), weight.to(device), None if bias is None else bias.to(device)
    )
    assert_close(out.cpu(), reference_linear(x, weight, bias))


@pytest.mark.parametrize("features", [2048, 900])
def test_a_row_has_the_same_bits_in_every_batch(
    features: int, device: torch.device, generator: torch.Generator
) -> None:
    """In two splits, and in one. Values are whole and small, so that the interpreter's own products
    are exact; the order on a GPU is shown by tests/kernels/test_ptx_shipped_kernels.py."""
    assert splits_of(72, features) == (2 if features == 2048 else 1)
    x = torch.randint(-4, 5, (70, features), generator=generator).float().to(device)
    weight = torch.randint(-4, 5, (72, features), generator=generator).float().to(device)
    many = launch_linear_fixed(x, weight, None)
    for rows in (1, 16, 17, 64):
        assert torch.equal(launch_linear_fixed(x[:rows], weight, None), many[:rows])


def test_splits_follow_from_the_matrix_alone() -> None:
    assert splits_of(4096, 4096) == 4
    assert splits_of(28672, 4096) == 1
    assert splits_of(4096, 14336) == 5
    assert splits_of(64, 900) == 1


def test_programs_stay_in_bounds_and_apart(
    sanitized: Callable[[], AbstractContextManager[None]],
    device: torch.device,
    generator: torch.Generator,
) -> None:
    x = drawn(generator, 5, 2100, dtype=torch.float32).to(device)
    weight = drawn(generator, 70, 2100, dtype=torch.float32).to(device)
    with sanitized():
        launch_linear_fixed(x, weight, None)
        launch_linear_fixed(x.repeat(14, 1), weight, None)


def test_other_shapes_of_input_are_taken(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    x = drawn(generator, 1, 48, 3, dtype=torch.float32).transpose(1, 2).to(device)
    weight = drawn(generator, 8, 48, dtype=torch.float32).to(device)
    assert_close(linear_fixed(x, weight).cpu(), reference_linear(x.cpu(), weight.cpu()))
    assert linear_fixed(x[:, :0], weight).shape == (1, 0, 8)
