"""lowrank_experts_ in Triton against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from quickchange_kernels.lowrank import lowrank_contract
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, PageKind, RowTiles, Segments
from quickchange_kernels.lowrank.lowrank_experts_triton import launch_lowrank_experts
from quickchange_kernels.random_inputs import make_segments, random_tables

Close = Callable[[Tensor, Tensor], None]
Sanitized = Callable[..., AbstractContextManager[None]]
Holder = TypeVar("Holder", LowRankTables, Segments, RowTiles)
EXPERTS = 5


def moved(holder: Holder, device: torch.device) -> Holder:
    """The same with its tensors on the device."""
    fields = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    tensors = {name: v.to(device) for name, v in fields.items() if isinstance(v, Tensor)}
    tiles = {name: moved(v, device) for name, v in fields.items() if isinstance(v, RowTiles)}
    return dataclasses.replace(holder, **tensors, **tiles)


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def launched(
    y: Tensor,
    x: Tensor,
    expert: Tensor,
    choices: int,
    tables: LowRankTables,
    segments: Segments,
    device: torch.device,
) -> Tensor:
    """y afterwards, on the CPU. The experts' groups are 2, 3, ..."""
    y, x, expert = (tensor.clone().to(device) for tensor in (y, x, expert))
    operands = lowrank_contract.operands_experts(
        moved(tables, device), moved(segments, device), range(2, 2 + EXPERTS)
    )
    launch_lowrank_experts(y, x, expert, choices, EXPERTS, *operands)
    return y.cpu()


def check(
    rows: int,
    choices: int,
    sizes: tuple[int, int],
    tables: LowRankTables,
    segments: Segments,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    assert_close: Close,
    *,
    shared: bool = True,
) -> None:
    x = randn(rows if shared else rows * choices, sizes[0], generator=generator, dtype=dtype)
    y = randn(rows * choices, sizes[1], generator=generator, dtype=dtype)
    expert = torch.randint(0, EXPERTS, (rows * choices,), generator=generator)
    expected = lowrank_contract.reference_lowrank_experts(
        y, x, expert, choices, tables, segments, 2
    )
    assert_close(launched(y, x, expert, choices, tables, segments, device), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["x of tokens", "x of rows"])
@pytest.mark.parametrize("sizes", [(64, 48), (37, 300), (700, 8)])
def test_every_row_takes_its_experts_pages(
    sizes: tuple[int, int],
    shared: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    assert_close: Close,
) -> None:
    tables = random_tables(sizes[0], [sizes[1]], [4, 0, 33], generator, groups=8, dtype=dtype)
    spans = [(0, 1, 0, 1.0), (1, 3, 1, 0.5), (3, 6, 2, -1.0), (7, 9, 0, 2.0), (7, 9, 2, 0.3)]
    check(
        *(10, 3, sizes, tables, make_segments(spans), dtype, generator, device, assert_close),
        shared=shared,
    )


@pytest.mark.parametrize("height", [16, 64])
def test_a_tiles_height_changes_no_result(
    height: int, generator: torch.Generator, device: torch.device
) -> None:
    tables = random_tables(40, [24], [9, 16], generator, groups=8)
    x, y = randn(20, 40, generator=generator), randn(40, 24, generator=generator)
    expert = torch.randint(0, EXPERTS, (40,), generator=generator)
    spans = [(0, 17, 0, 1.0), (17, 20, 1, 0.5)]
    usual = launched(y, x, expert, 2, tables, make_segments(spans, 16), device)
    other = launched(y, x, expert, 2, tables, make_segments(spans, height), device)
    assert torch.equal(usual, other)


def test_activations_and_shifts_are_an_experts_too(
    generator: torch.Generator, device: torch.device, assert_close: Close
) -> None:
    kinds = [kind for kind in PageKind if kind is not PageKind.GAIN]
    tables = random_tables(48, [32], [20, 9], generator, groups=8, kinds=kinds, bias=True)
    segments = make_segments([(0, 4, 0, 1.0), (4, 6, 1, 0.5)])
    check(6, 2, (48, 32), tables, segments, torch.float32, generator, device, assert_close)


def test_nothing_outside_the_operands_is_touched(
    generator: torch.Generator, device: torch.device, sanitized: Sanitized
) -> None:
    tables = random_tables(33, [21], [5, 12], generator, groups=2 + EXPERTS)
    x, y = randn(5, 33, generator=generator), randn(10, 21, generator=generator)
    expert = torch.randint(0, EXPERTS, (10,), generator=generator)
    segments = make_segments([(0, 3, 0, 1.0), (3, 4, 1, 0.5), (3, 4, 0, 0.5)])
    with sanitized():
        launched(y, x, expert, 2, tables, segments, device)


def test_operands_that_do_not_fit_are_refused(
    generator: torch.Generator, device: torch.device
) -> None:
    tables = random_tables(16, [16], [8], generator, groups=2 + EXPERTS)
    segments = make_segments([(0, 2, 0, 1.0)])
    x, y = torch.zeros(2, 16), torch.zeros(4, 16)
    expert = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="choices"):
        launched(y, x[:1], expert, 2, tables, segments, device)
    with pytest.raises(TypeError, match="int64"):
        launched(y, x, expert.int(), 2, tables, segments, device)
