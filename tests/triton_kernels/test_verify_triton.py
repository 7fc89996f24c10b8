"""verify in Triton against its reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from draft_trees import as_lists, random_drafts

from quickchange_kernels.sampling.verify import MAX_ROWS, reference_verify, verify

Sanitized = Callable[..., AbstractContextManager[None]]


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("agreement", [0.3, 0.9, 1.0])
def test_ragged_paths_equal_the_references(
    tree: bool, agreement: float, device: torch.device, sanitized: Sanitized
) -> None:
    lengths = [1, 7, 0, 12, 3, 0, 13]
    drafts = random_drafts(lengths, 3, tree=tree, device=device, agreement=agreement)
    arguments = (
        drafts.sampled, drafts.drafted, drafts.rows, 13, drafts.parent if tree else None,
    )  # fmt: skip
    with sanitized():
        out = verify(*arguments)
    assert as_lists(*out) == reference_verify(*arguments)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_the_longest_sequences_equal_the_references(tree: bool, device: torch.device) -> None:
    drafts = random_drafts([MAX_ROWS, 1, 100], 5, tree=tree, device=device, agreement=0.98)
    arguments = (
        drafts.sampled, drafts.drafted, drafts.rows, MAX_ROWS, drafts.parent if tree else None,
    )  # fmt: skip
    assert as_lists(*verify(*arguments)) == reference_verify(*arguments)


def test_padding_alone_gives_empty_paths(device: torch.device, sanitized: Sanitized) -> None:
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.ones(2, 2, dtype=torch.int32, device=device)
    for parent in (None, tokens.int()):
        with sanitized():
            out = verify(tokens, tokens, rows, 3, parent)
        assert as_lists(*out) == [(0, 0, []), (0, 0, [])]
