"""token_mask_ against its reference, which goes bit by bit: native where it can be built, plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickchange_kernels.sampling.token_mask import (
    mask_words,
    plain_token_mask_,
    reference_token_mask,
    token_mask_,
)

Run = Callable[[Tensor, Tensor, Tensor], None]

every_version = pytest.mark.parametrize(
    "run", [token_mask_, plain_token_mask_], ids=["dispatched", "plain"]
)


@every_version
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 130),
    masked=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
def test_only_clear_bits_of_masked_rows_become_minus_infinity(
    run: Run, rows: int, vocabulary: int, masked: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, vocabulary + 3, generator=generator).to(dtype)
    logits = wide[:, :vocabulary]  # rows further apart than they are long
    where = torch.randperm(rows, generator=generator)[:masked]
    shape = (len(where), mask_words(vocabulary))
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    expected = reference_token_mask(logits, where, bits)
    beyond = wide[:, vocabulary:].clone()
    run(logits, where, bits)
    assert torch.equal(logits, expected)
    assert torch.equal(wide[:, vocabulary:], beyond)


def test_masks_of_another_width_are_refused() -> None:
    logits, rows = torch.zeros(2, 40), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_mask_: logits \[2, 40\]"):
        token_mask_(logits, rows, torch.zeros(1, 1, dtype=torch.int32))


def test_a_row_outside_the_logits_is_refused() -> None:
    with pytest.raises(IndexError):
        token_mask_(torch.zeros(2, 8), torch.tensor([2]), torch.zeros(1, 1, dtype=torch.int32))
