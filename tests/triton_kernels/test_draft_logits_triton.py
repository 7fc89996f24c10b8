"""draft_logits in Triton against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from draft_vocabularies import random_case
from torch import Tensor

from quickchange_kernels.turbo_heads.draft_logits import draft_logits, reference_draft_logits

Sanitized = Callable[..., AbstractContextManager[None]]
PARTS = [(1, 50), (3, 7), (2, 0), (5, 33)]


def assert_same(out: Tensor, reference: Tensor) -> None:
    """-inf in the same places, and close everywhere else."""
    out = out.cpu()
    assert out.dtype == torch.float32
    assert torch.equal(out.isneginf(), reference.isneginf())
    finite = ~reference.isneginf()
    assert (out[finite] - reference[finite]).norm() / reference[finite].norm() < 1e-3


@pytest.mark.parametrize("features", [1, 37, 64, 96])
@pytest.mark.parametrize("biased", [False, True])
def test_segments_of_any_sizes_match_float64(
    features: int,
    biased: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    sanitized: Sanitized,
) -> None:
    case = random_case(PARTS, features, generator, dtype, dtype, biased=biased, spare=3)
    there = case.to(device)
    with sanitized():
        out = draft_logits(*there)
    assert_same(out, reference_draft_logits(*case))


def test_weights_narrower_than_the_rows_match_float64(
    generator: torch.Generator, device: torch.device
) -> None:
    case = random_case(PARTS, 64, generator, torch.float32, torch.bfloat16)
    assert_same(draft_logits(*case.to(device)), reference_draft_logits(*case))


def test_more_rows_of_a_segment_than_a_block_match_float64(
    generator: torch.Generator, device: torch.device
) -> None:
    case = random_case([(21, 40)], 64, generator, torch.float16, torch.float16)
    assert_same(draft_logits(*case.to(device)), reference_draft_logits(*case))


def test_a_rows_logits_do_not_depend_on_the_others(
    generator: torch.Generator, device: torch.device
) -> None:
    case = random_case([(19, 40)], 64, generator, torch.bfloat16, torch.bfloat16).to(device)
    one = torch.tensor([[0, 1, 0, 40]], dtype=torch.int32, device=device)
    alone = draft_logits(case.h[-1:], case.weight, case.vocabulary, one, 40)
    assert torch.equal(alone[0], draft_logits(*case)[-1])


def test_no_rows_give_no_logits(generator: torch.Generator, device: torch.device) -> None:
    case = random_case([], 8, generator, spare=4).to(device)
    assert draft_logits(*case).shape == (0, 4)
