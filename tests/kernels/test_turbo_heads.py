"""turbo_heads against float64, in every version."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from turbo_items import MIXED, random_heads, random_rows, with_padding

from quickchange_kernels.turbo_heads import (
    HeadItems,
    HeadTables,
    plain_turbo_heads,
    reference_turbo_heads,
    turbo_heads,
)

Run = Callable[[Tensor, HeadTables, HeadItems], Tensor]
Close = Callable[[Tensor, Tensor], None]


def run_plain(x: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    return plain_turbo_heads(x, heads.arena, heads.offsets, items.items, items.segments)


@pytest.fixture
def run(version: str) -> Run:
    return run_plain if version == "plain" else turbo_heads


@pytest.mark.parametrize("width", [1, 37, 64, 200])
@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_any_number_of_heads_match_float64(
    width: int,
    arena_dtype: torch.dtype,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    heads = random_heads(5, width, arena_dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    out = run(x, heads, items)
    assert out.dtype == dtype
    assert_close(out, reference_turbo_heads(x, heads, items))


@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 21])
def test_rows_that_share_a_head_match_float64(
    sharing: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    wanted = [(row, row % 2) for row in range(2 * sharing)]
    heads = random_heads(2, 48, torch.float32, generator)
    x = random_rows(wanted, 48, torch.float32, generator)
    items = HeadItems.of(wanted)
    assert items.segments.tolist() == [[0, sharing, 0], [sharing, 2 * sharing, 1]]
    assert_close(run(x, heads, items), reference_turbo_heads(x, heads, items))


@pytest.mark.usefixtures("native_version")
def test_an_items_result_does_not_depend_on_the_others(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    wanted = [(row, 0) for row in range(7)]
    heads = random_heads(1, 136, dtype, generator)
    x = random_rows(wanted, 136, dtype, generator)
    together = turbo_heads(x, heads, HeadItems.of(wanted))
    for count in (1, 2, 3):
        alone = turbo_heads(x, heads, HeadItems.of(wanted[:count]))
        assert torch.equal(alone, together[:count])


def test_no_items_give_no_rows(run: Run, generator: torch.Generator) -> None:
    heads = random_heads(1, 8, torch.float32, generator)
    assert run(torch.zeros(3, 8), heads, HeadItems.of([])).shape == (0, 8)


def test_large_values_neither_overflow_nor_vanish(run: Run) -> None:
    heads = HeadTables(torch.tensor([500.0, 0.0, -500.0, 0.0]), torch.tensor([[0, 1], [2, 3]]))
    out = run(torch.ones(1, 1), heads, HeadItems.of([(0, 0), (0, 1)]))
    assert out.tolist() == [[501.0], [1.0]]


def test_rows_that_are_not_contiguous_are_refused() -> None:
    heads = HeadTables(torch.zeros(100), torch.tensor([[0, 64]]))
    with pytest.raises(ValueError, match="contiguous rows"):
        turbo_heads(torch.zeros(8, 8).T, heads, HeadItems.of([(0, 0)]))
