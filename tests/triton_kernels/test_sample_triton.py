"""sample in Triton draws what the plain version draws, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from mass_edges import draws_at_edges
from torch import Tensor

from quickchange_kernels.sampling.sample_contract import Draws, Edits, sample
from quickchange_kernels.sampling.sample_plain import plain_sample

NEVER = float("-inf")


def plain(logits: Tensor, how: Draws, edits: Edits | None = None) -> tuple[Tensor, Tensor]:
    changes = (None, None, None) if edits is None else (edits.begin, edits.token, edits.value)
    return plain_sample(logits, how.temperature, how.uniform, how.filters, *changes)


def check(logits: Tensor, how: Draws, edits: Edits | None = None) -> None:
    expected_tokens, expected_sound = plain(logits.clone(), how, edits)
    tokens, sound = sample(logits, how, edits)
    assert sound.tolist() == expected_sound.tolist()
    assert tokens.tolist() == expected_tokens.tolist()


def column(*values: float, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


@pytest.fixture
def draws(device: torch.device) -> Draws:
    """Five rows: greedy, plain, each filter, all filters, a filter that is off."""
    return Draws(
        temperature=column(0.0, 1.0, 0.7, 1.4, 1e-45, device=device),
        uniform=column(0.5, 0.73, 0.31, 0.99, 1 - 2**-53, device=device),
        top_k=column(3, 0, 50, 7, 10**6, device=device),
        top_p=column(0.5, 1.0, 0.9, 0.6, 0.0, device=device),
        min_p=column(0.1, 0.0, 0.02, 0.3, 0.0, device=device),
        typical_p=column(0.3, 0.4, 0.85, 1.0, 0.0, device=device),
    )


@pytest.mark.parametrize("size", [5, 511, 9001])
def test_every_kind_of_row_draws_the_plain_versions_token(
    size: int,
    dtype: torch.dtype,
    draws: Draws,
    generator: torch.Generator,
    device: torch.device,
    sanitized: Callable[..., AbstractContextManager[None]],
) -> None:
    logits = (torch.randn(5, size + 3, generator=generator) * 4).to(device, dtype)[:, 3:]
    with sanitized():
        sample(logits.clone(), draws)
    check(logits, draws)


@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_masses_have_every_bit_of_the_plain_versions(
    spread: float, generator: torch.Generator, device: torch.device
) -> None:
    logits = torch.randn(3, 500, generator=generator) * spread
    temperature = torch.tensor([1.0, 0.7, 1.9], dtype=torch.float64)
    rows, how, expected = draws_at_edges(logits, temperature)
    assert how.temperature is not None
    assert how.uniform is not None
    moved = Draws(how.temperature.to(device), how.uniform.to(device))
    assert sample(rows.to(device), moved).tokens.tolist() == expected


@pytest.mark.parametrize("used", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
def test_filters_that_no_row_uses_are_left_out(
    used: str, draws: Draws, generator: torch.Generator, device: torch.device
) -> None:
    logits = (torch.randn(5, 700, generator=generator) * 4).to(device)
    fields = {"temperature": draws.temperature, "uniform": draws.uniform}
    check(logits, Draws(**{**fields, used: getattr(draws, used)}))


def test_without_temperatures_the_first_best_is_taken(device: torch.device) -> None:
    logits = torch.zeros(2, 9000, device=device)
    logits[0, [5000, 8000]] = 1
    assert sample(logits, Draws()).tokens.tolist() == [5000, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_ties_and_impossible_tokens(
    uniform: float, draws: Draws, generator: torch.Generator, device: torch.device
) -> None:
    logits = torch.randint(-3, 4, (5, 6001), generator=generator).float()
    logits[torch.rand(5, 6001, generator=generator) < 0.5] = NEVER
    logits[:, 5000] = -0.0
    logits[:, :4200] = NEVER  # a whole split that holds nothing
    same = torch.full((5,), uniform, dtype=torch.float64, device=device)
    how = Draws(torch.ones_like(same), same, draws.top_k, draws.top_p, draws.min_p, draws.typical_p)
    check(logits.to(device), how)


@pytest.mark.parametrize("size", [5000, 40])  # of two splits and of one
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), NEVER])
def test_rows_that_are_not_sound_are_marked_alone(
    bad: float, size: int, draws: Draws, generator: torch.Generator, device: torch.device
) -> None:
    logits = torch.randn(5, size, generator=generator).to(device)
    logits[2, size - 1] = bad
    if bad != bad or bad == NEVER:
        logits[2] = bad
    logits[0, 10] = float("nan")
    check(logits.clone(), draws)
    assert sample(logits, draws).sound.tolist() == [False, True, False, True, True]


def test_edits_are_made_in_order_with_padding_ignored(
    generator: torch.Generator,
    device: torch.device,
    sanitized: Callable[..., AbstractContextManager[None]],
) -> None:
    size, many = 1500, 700  # more edits of one kind than a block holds
    logits = torch.randn(2, size, generator=generator).to(device) * 3
    kinds = [
        torch.randperm(size, generator=generator)[:count] for count in (3, 2, many, 0, 0, 1, 0, 40)
    ]
    begin = torch.tensor([0, *(len(kind) for kind in kinds)]).cumsum(0)
    values = torch.rand(int(begin[-1]), generator=generator) + 0.5
    edits = Edits(
        begin.int().to(device),
        torch.cat([*kinds, torch.tensor([2**30])]).int().to(device),
        torch.cat([values, torch.tensor([float("nan")])]).to(device),
    )
    how = Draws(column(0.9, 0.0, device=device), column(0.4, 0.4, device=device))
    expected = logits.clone()
    plain(expected, how, edits)
    check(logits.clone(), how, edits)
    with sanitized():
        sample(logits, how, edits)
    assert torch.equal(logits, expected)


def test_sixteen_bit_logits_are_edited_in_a_copy(
    generator: torch.Generator, device: torch.device
) -> None:
    logits = torch.randn(1, 60, generator=generator).to(device, torch.bfloat16)
    kept = logits.clone()
    edits = Edits(
        torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32, device=device),
        torch.tensor([7], dtype=torch.int32, device=device),
        torch.tensor([50.3], device=device),
    )
    assert sample(logits, Draws(), edits).tokens.tolist() == [7]
    assert torch.equal(logits, kept)


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    assert sample(torch.zeros(0, 5, device=device), Draws()).tokens.shape == (0,)
