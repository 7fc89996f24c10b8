"""turbo_heads and head_logits in Triton against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from turbo_items import MIXED, random_heads, random_rows, with_padding

from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    HeadItems,
    HeadTables,
    head_logits,
    reference_head_logits,
    reference_turbo_heads,
    turbo_heads,
)

Close = Callable[[Tensor, Tensor], None]
Sanitized = Callable[..., AbstractContextManager[None]]


def moved(device: torch.device, heads: HeadTables) -> HeadTables:
    tensors = (heads.arena, heads.pages, heads.matrices)
    return HeadTables(*(tensor.to(device) for tensor in tensors))


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
    heads = random_heads(5, width, width, arena_dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    there = x.to(device)
    with sanitized():
        out = turbo_heads(there, there, moved(device, heads), items.to(device))
    assert_close(out, reference_turbo_heads(x, x, heads, items))


@pytest.mark.parametrize("width", [40, 64])
def test_heads_that_read_an_embedding_too_match_float64(
    width: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    assert_close: Close,
    sanitized: Sanitized,
) -> None:
    heads = random_heads(5, width, 2 * width, dtype, generator)
    x = random_rows(MIXED, width, dtype, generator)
    z = random_rows(MIXED, 2 * width, dtype, generator)
    items = HeadItems.of(MIXED)
    with sanitized():
        out = turbo_heads(x.to(device), z.to(device), moved(device, heads), items.to(device))
    assert_close(out, reference_turbo_heads(x, z, heads, items))


@pytest.mark.parametrize("width", [70, 96])
def test_logits_of_own_lm_heads_match_float64(
    width: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    assert_close: Close,
    sanitized: Sanitized,
) -> None:
    heads = random_heads(5, width, 64, dtype, generator)
    z = random_rows(MIXED, 64, dtype, generator)
    items = with_padding(HeadItems.of(MIXED))
    with sanitized():
        out = head_logits(z.to(device), moved(device, heads), items.to(device), width)
    assert out.dtype == torch.float32
    assert_close(out, reference_head_logits(z, heads, items, width))


@pytest.mark.parametrize("sharing", [16, 21])
def test_more_rows_of_one_head_than_a_block_match_float64(
    sharing: int, generator: torch.Generator, device: torch.device, assert_close: Close
) -> None:
    wanted = [(row, 0) for row in range(sharing)]
    heads = random_heads(1, 64, 64, torch.float16, generator)
    x = random_rows(wanted, 64, torch.float16, generator)
    there, items = x.to(device), HeadItems.of(wanted)
    out = turbo_heads(there, there, moved(device, heads), items.to(device))
    assert_close(out, reference_turbo_heads(x, x, heads, items))


def test_an_items_result_does_not_depend_on_the_others(
    generator: torch.Generator, device: torch.device
) -> None:
    wanted = [(row, 0) for row in range(19)]
    heads = moved(device, random_heads(1, 64, 64, torch.bfloat16, generator))
    x = random_rows(wanted, 64, torch.bfloat16, generator).to(device)
    together = turbo_heads(x, x, heads, HeadItems.of(wanted).to(device))
    alone = turbo_heads(x, x, heads, HeadItems.of(wanted[-1:]).to(device))
    assert torch.equal(alone[0], together[-1])


def test_no_items_give_no_rows(generator: torch.Generator, device: torch.device) -> None:
    heads = moved(device, random_heads(1, 8, 8, torch.float32, generator))
    x, none = torch.zeros(3, 8, device=device), HeadItems.of([]).to(device)
    assert turbo_heads(x, x, heads, none).shape == (0, 8)
    assert head_logits(x, heads, none, 8).shape == (0, 8)
