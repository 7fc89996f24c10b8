"""turbo_heads in Triton against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from turbo_items import MIXED, random_heads, random_rows, with_padding

from quickchange_kernels.turbo_heads import (
    HeadItems,
    HeadTables,
    reference_turbo_heads,
    turbo_heads,
)

Close = Callable[[Tensor, Tensor], None]
Sanitized = Callable[..., AbstractContextManager[None]]


def moved(
    device: torch.device, x: Tensor, heads: HeadTables, items: HeadItems
) -> tuple[Tensor, HeadTables, HeadItems]:
    return (
        x.to(device),
        HeadTables(heads.arena.to(device), heads.offsets.to(device)),
        items.to(device),
    )


@pytest.mark.parametrize("width", [1, 37, 64, 176])
@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16])
def test_rows_with_any_number_of_heads_match_float64(
    width: int,
    arena_dtype: torch.dtype,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    assert_close: Close,
    sanitized: Sanitized,
) -> None:
    heads = random_heads(5, width, arena_dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    arguments = moved(device, x, heads, items)
    with sanitized():
        out = turbo_heads(*arguments)
    assert_close(out, reference_turbo_heads(x, heads, items))


@pytest.mark.parametrize("sharing", [16, 21])
def test_more_rows_of_one_head_than_a_block_match_float64(
    sharing: int, generator: torch.Generator, device: torch.device, assert_close: Close
) -> None:
    wanted = [(row, 0) for row in range(sharing)]
    heads = random_heads(1, 64, torch.float16, generator)
    x = random_rows(wanted, 64, torch.float16, generator)
    out = turbo_heads(*moved(device, x, heads, HeadItems.of(wanted)))
    assert_close(out, reference_turbo_heads(x, heads, HeadItems.of(wanted)))


def test_an_items_result_does_not_depend_on_the_others(
    generator: torch.Generator, device: torch.device
) -> None:
    wanted = [(row, 0) for row in range(19)]
    heads = random_heads(1, 64, torch.bfloat16, generator)
    x = random_rows(wanted, 64, torch.bfloat16, generator)
    together = turbo_heads(*moved(device, x, heads, HeadItems.of(wanted)))
    alone = turbo_heads(*moved(device, x, heads, HeadItems.of(wanted[-1:])))
    assert torch.equal(alone[0], together[-1])


def test_no_items_give_no_rows(generator: torch.Generator, device: torch.device) -> None:
    heads = random_heads(1, 8, torch.float32, generator)
    arguments = moved(device, torch.zeros(3, 8), heads, HeadItems.of([]))
    assert turbo_heads(*arguments).shape == (0, 8)
