"""turbo_heads and head_logits against float64, in every version."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from turbo_items import MIXED, random_heads, random_rows, with_padding

from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    HeadItems,
    HeadTables,
    head_logits,
    in_pages,
    plain_head_logits,
    plain_turbo_heads,
    reference_head_logits,
    reference_turbo_heads,
    turbo_heads,
)

Run = Callable[[Tensor, Tensor, HeadTables, HeadItems], Tensor]
RunLogits = Callable[[Tensor, HeadTables, HeadItems, int], Tensor]
Close = Callable[[Tensor, Tensor], None]


def run_plain(x: Tensor, z: Tensor, heads: HeadTables, items: HeadItems) -> Tensor:
    tables = (heads.arena, heads.pages, heads.matrices)
    return plain_turbo_heads(x, z, *tables, items.items, items.segments)


def run_plain_logits(z: Tensor, heads: HeadTables, items: HeadItems, width: int) -> Tensor:
    tables = (heads.arena, heads.pages, heads.matrices)
    return plain_head_logits(z, *tables, items.items, items.segments, width)


@pytest.fixture
def run(version: str) -> Run:
    return run_plain if version == "plain" else turbo_heads


@pytest.fixture
def run_logits(version: str) -> RunLogits:
    return run_plain_logits if version == "plain" else head_logits


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
    heads = random_heads(5, width, width, arena_dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    out = run(x, x, heads, items)
    assert out.dtype == dtype
    assert_close(out, reference_turbo_heads(x, x, heads, items))


@pytest.mark.parametrize("width", [24, 37, 64])
@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16])
def test_heads_that_read_an_embedding_too_match_float64(
    width: int,
    arena_dtype: torch.dtype,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    heads = random_heads(5, width, 2 * width, arena_dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    z = random_rows(MIXED, 2 * width, dtype, generator)
    items = HeadItems.of(MIXED)
    assert_close(run(x, z, heads, items), reference_turbo_heads(x, z, heads, items))


@pytest.mark.parametrize("width", [1, 33, 640])
@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_own_lm_heads_match_float64(
    width: int,
    arena_dtype: torch.dtype,
    run_logits: RunLogits,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    heads = random_heads(5, width, 48, arena_dtype, generator)
    z = random_rows(MIXED, 48, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    out = run_logits(z, heads, items, width)
    assert out.dtype == torch.float32
    error = (out - reference_head_logits(z, heads, items, width)).norm() / out.norm()
    assert error < 1e-5


@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 9, 21])
def test_rows_that_share_a_head_match_float64(
    sharing: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    wanted = [(row, row % 2) for row in range(2 * sharing)]
    heads = random_heads(2, 48, 48, torch.float32, generator)
    x = random_rows(wanted, 48, torch.float32, generator)
    items = HeadItems.of(wanted)
    assert items.segments.tolist() == [[0, sharing, 0], [sharing, 2 * sharing, 1]]
    assert_close(run(x, x, heads, items), reference_turbo_heads(x, x, heads, items))


@pytest.mark.usefixtures("native_version")
def test_an_items_result_does_not_depend_on_the_others(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    wanted = [(row, 0) for row in range(23)]
    heads = random_heads(1, 136, 136, dtype, generator)
    x = random_rows(wanted, 136, dtype, generator)
    together = turbo_heads(x, x, heads, HeadItems.of(wanted))
    logits = head_logits(x, heads, HeadItems.of(wanted), 136)
    for count in (1, 2, 3, 8, 9):
        items = HeadItems.of(wanted[:count])
        assert torch.equal(turbo_heads(x, x, heads, items), together[:count])
        assert torch.equal(head_logits(x, heads, items, 136), logits[:count])


def test_no_items_give_no_rows(run: Run, run_logits: RunLogits, generator: torch.Generator) -> None:
    heads = random_heads(1, 8, 8, torch.float32, generator)
    x = torch.zeros(3, 8)
    assert run(x, x, heads, HeadItems.of([])).shape == (0, 8)
    assert run_logits(x, heads, HeadItems.of([]), 8).shape == (0, 8)


def test_large_values_neither_overflow_nor_vanish(run: Run) -> None:
    arena = torch.cat([in_pages(torch.tensor([[value]])).flatten() for value in (500.0, -500.0)])
    ranges = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    heads = HeadTables(arena, torch.tensor([0, 32]), ranges)
    out = run(torch.ones(1, 1), torch.ones(1, 1), heads, HeadItems.of([(0, 0), (0, 1)]))
    assert out.tolist() == [[501.0], [1.0]]


def test_a_page_is_16_rows_of_weights_and_then_their_biases() -> None:
    pages = in_pages(torch.arange(36.0).view(18, 2), torch.arange(100.0, 118.0))
    assert pages.shape == (2, 48)
    assert pages[0].tolist() == [*range(32), *range(100, 116)]
    assert pages[1].tolist() == [32, 33, 34, 35, *[0] * 28, 116, 117, *[0] * 14]
    assert in_pages(torch.ones(16, 3)).tolist() == [[*[1] * 48, *[0] * 16]]


def test_rows_that_are_not_contiguous_are_refused(generator: torch.Generator) -> None:
    heads = random_heads(1, 8, 8, torch.float32, generator)
    turned, items = torch.zeros(8, 8).T, HeadItems.of([(0, 0)])
    with pytest.raises(ValueError, match=r"x of shape .* contiguous rows"):
        turbo_heads(turned, torch.zeros(8, 8), heads, items)
    with pytest.raises(ValueError, match=r"z of shape .* contiguous rows"):
        turbo_heads(torch.zeros(8, 8), turned, heads, items)
    with pytest.raises(ValueError, match="contiguous rows"):
        head_logits(turned, heads, items, 8)


def test_rows_of_two_kinds_are_refused(generator: torch.Generator) -> None:
    heads = random_heads(1, 8, 8, torch.float32, generator)
    with pytest.raises(ValueError, match="as many rows and one dtype"):
        turbo_heads(torch.zeros(3, 8), torch.zeros(4, 8), heads, HeadItems.of([(0, 0)]))
