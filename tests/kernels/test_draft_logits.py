"""draft_logits against float64, in every version."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from draft_vocabularies import DraftCase, random_case
from torch import Tensor

from quickchange_kernels.turbo_heads.draft_logits import (
    draft_logits,
    plain_draft_logits,
    reference_draft_logits,
)

Run = Callable[..., Tensor]


def run_plain(
    h: Tensor,
    weight: Tensor,
    vocabulary: Tensor,
    segments: Tensor,
    width: int,
    bias: Tensor | None = None,
) -> Tensor:
    return plain_draft_logits(h, weight, bias, vocabulary, segments, width)


@pytest.fixture
def run(version: str) -> Run:
    return run_plain if version == "plain" else draft_logits


def assert_same(out: Tensor, case: DraftCase) -> None:
    """-inf in the same places, and close everywhere else."""
    expected = reference_draft_logits(*case)
    assert out.dtype == torch.float32
    assert torch.equal(out.isneginf(), expected.isneginf())
    finite = ~expected.isneginf()
    error = (out[finite] - expected[finite]).norm() / expected[finite].norm()
    assert error < 1e-5


@pytest.mark.parametrize("features", [1, 37, 64, 200])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_segments_of_any_sizes_match_float64(
    features: int,
    weight_dtype: torch.dtype,
    biased: bool,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    parts = [(1, 50), (3, 7), (2, 1), (5, 130)]
    case = random_case(parts, features, generator, dtype, weight_dtype, biased=biased)
    assert_same(run(*case), case)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 16, 70])
def test_rows_that_share_a_vocabulary_match_float64(
    rows: int, run: Run, generator: torch.Generator
) -> None:
    case = random_case([(rows, 90)], 72, generator)
    assert_same(run(*case), case)


def test_tokens_past_a_segments_end_are_minus_infinity(
    run: Run, generator: torch.Generator
) -> None:
    case = random_case([(1, 3), (2, 0), (1, 40)], 16, generator, spare=9)
    out = run(*case)
    assert out.shape == (4, 49)
    assert out.isfinite().sum(dim=1).tolist() == [3, 0, 0, 40]
    assert_same(out, case)


@pytest.mark.usefixtures("native_version")
def test_a_rows_logits_depend_neither_on_the_others_nor_on_the_vocabulary(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = random_case([(40, 100)], 136, generator, dtype, dtype)
    together = draft_logits(*case)
    for count in (1, 2, 3, 4, 8, 9, 40):
        segments = torch.tensor([[0, count, 0, 100]], dtype=torch.int32)
        out = draft_logits(case.h[:count], case.weight, case.vocabulary, segments, 100)
        assert torch.equal(out, together[:count])
    one = torch.tensor([[0, 40, 63, 64]], dtype=torch.int32)
    out = draft_logits(case.h, case.weight, case.vocabulary, one, 1)
    assert torch.equal(out[:, 0], together[:, 63])


def test_no_rows_give_no_logits(run: Run, generator: torch.Generator) -> None:
    case = random_case([], 8, generator, spare=4)
    assert run(*case).shape == (0, 4)


def test_operands_that_do_not_fit_are_refused(generator: torch.Generator) -> None:
    case = random_case([(1, 3)], 16, generator)
    with pytest.raises(ValueError, match=r"must be \[I, H\] and \[V, H\]"):
        draft_logits(case.h[:, 1:], *case[1:])
    with pytest.raises(ValueError, match="rows must be contiguous"):
        draft_logits(torch.zeros(16, 16).T, *case[1:])
