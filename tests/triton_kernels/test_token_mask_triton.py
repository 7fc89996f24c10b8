"""token_mask_'s Triton kernel against its reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from quickchange_kernels.sampling.token_mask import mask_words, reference_token_mask, token_mask_


@pytest.mark.parametrize("vocabulary", [5, 64, 2048 + 37])
@pytest.mark.parametrize("masked", [0, 1, 3])
def test_only_clear_bits_of_masked_rows_become_minus_infinity(
    vocabulary: int,
    masked: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    sanitized: Callable[..., AbstractContextManager[None]],
) -> None:
    wide = torch.randn(4, vocabulary + 5, generator=generator).to(dtype)
    rows = torch.randperm(4, generator=generator)[:masked]
    shape = (masked, mask_words(vocabulary))
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    expected = reference_token_mask(wide[:, :vocabulary], rows, bits)
    there = wide.to(device)
    with sanitized():
        token_mask_(there[:, :vocabulary], rows.to(device), bits.to(device))
    assert torch.equal(there[:, :vocabulary].cpu(), expected)
    assert torch.equal(there[:, vocabulary:].cpu(), wide[:, vocabulary:])
