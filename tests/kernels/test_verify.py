"""verify against its reference, which goes row by row: native where it can be built, and plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from draft_chains import as_lists, random_drafts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickchange_kernels.sampling.verify import (
    MAX_ROWS,
    Verified,
    plain_verify,
    reference_verify,
    verify,
)

Run = Callable[..., Verified]
CPU = torch.device("cpu")


def run_plain(sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int) -> Verified:
    return Verified(*plain_verify(sampled, drafted, rows, longest))


every_version = pytest.mark.parametrize("run", [verify, run_plain], ids=["dispatched", "plain"])


@every_version
@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.sampled_from([0.3, 0.8, 1.0]),
    st.integers(0, 3),
)
def test_paths_equal_the_references(
    run: Run, lengths: list[int], seed: int, agreement: float, spare: int
) -> None:
    drafts = random_drafts(lengths, seed, CPU, agreement=agreement)
    arguments = (*drafts, max(1, *lengths) + spare)
    assert as_lists(*run(*arguments)) == reference_verify(*arguments)


def tokens(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def ranges(*values: tuple[int, int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@every_version
def test_a_chain_ends_at_the_first_draft_that_differs(run: Run) -> None:
    out = run(tokens(7, 8, 9, 1), tokens(0, 7, 5, 9), ranges((0, 4)), 4)
    assert as_lists(*out) == [(1, 8, [0, 1])]


@every_version
def test_a_sequence_without_drafts_gives_its_one_token(run: Run) -> None:
    assert as_lists(*run(tokens(3), tokens(9), ranges((0, 1)), 1)) == [(0, 3, [0])]


@every_version
def test_no_sequences_give_nothing(run: Run) -> None:
    out = run(tokens(), tokens(), ranges().view(0, 2), 4)
    assert [part.shape for part in out] == [(0,), (0,), (0, 4)]


@every_version
def test_padding_alone_gives_empty_paths(run: Run) -> None:
    out = run(tokens(), tokens(), ranges((0, 0), (0, 0)), 2)
    assert as_lists(*out) == [(0, 0, []), (0, 0, [])]


@pytest.mark.parametrize("longest", [0, MAX_ROWS + 1])
def test_sequences_of_a_length_that_is_not_served_are_refused(longest: int) -> None:
    with pytest.raises(ValueError, match=f"longest is {longest}"):
        verify(tokens(3), tokens(9), ranges((0, 1)), longest)


def test_tokens_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        verify(tokens(3), tokens(9, 9), ranges((0, 1)), 1)
