"""verify in Triton against its reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from draft_chains import as_lists, random_drafts

from quickchange_kernels.sampling.verify import MAX_ROWS, reference_verify, verify

Sanitized = Callable[..., AbstractContextManager[None]]


@pytest.mark.parametrize("agreement", [0.3, 0.9, 1.0])
def test_ragged_paths_equal_the_references(
    agreement: float, device: torch.device, sanitized: Sanitized
) -> None:
    drafts = random_drafts([1, 7, 0, 12, 3, 0, 13], 3, device, agreement=agreement)
    arguments = (*drafts, 13)
    with sanitized():
        out = verify(*arguments)
    assert as_lists(*out) == reference_verify(*arguments)


def test_the_longest_sequences_equal_the_references(device: torch.device) -> None:
    arguments = (*random_drafts([MAX_ROWS, 1, 100], 5, device, agreement=0.98), MAX_ROWS)
    assert as_lists(*verify(*arguments)) == reference_verify(*arguments)


def test_padding_alone_gives_empty_paths(device: torch.device, sanitized: Sanitized) -> None:
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.ones(2, 2, dtype=torch.int32, device=device)
    with sanitized():
        out = verify(tokens, tokens, rows, 3)
    assert as_lists(*out) == [(0, 0, []), (0, 0, [])]
