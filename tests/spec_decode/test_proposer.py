"""Chains of drafts end where they can bring nothing more."""

from __future__ import annotations

from recorded_drafts import NO_TEXT

from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.protocol import Drafting, SamplingParams, Submit
from quickchange_server.spec_decode.acceptance_rates import Acceptance, Drafter
from quickchange_server.spec_decode.proposer import Proposer
from quickchange_server.spec_decode.step_view import HeadDrafts

STOP = 99


def offered(
    prompt: tuple[int, ...], heads: tuple[int, ...], chance: float = 0.95, *, lookup: bool = False
) -> list[int]:
    """Tokens of the chain behind a prompt, where heads draft `heads`, each with `chance`."""
    sampling = SamplingParams(max_tokens=50, temperature=0.0, stop_token_ids=[STOP])
    drafting = Drafting("heads", lookup=lookup)
    sequence = Sequence(Submit("a", prompt, sampling, drafting=drafting, seed=0), 0.0)
    count = len(heads)
    if heads:
        sequence.head_drafts = HeadDrafts(len(prompt), heads, (chance,) * count, (0,) * count)
    return [draft.token for draft in Proposer(Acceptance(), 1_000, NO_TEXT).chain(sequence)]


def test_the_heads_chain_ends_before_a_stop_token() -> None:
    assert offered((1, 2), (3, 4, STOP, 5)) == [3, 4]
    assert offered((1, 2), (STOP, 3)) == []


def test_a_lookup_s_chain_ends_before_a_stop_token() -> None:
    assert offered((1, 2, 3, 4, STOP, 5, 1, 2, 3), (), lookup=True) == [4]


def test_a_chain_ends_with_the_first_draft_that_is_hardly_reached() -> None:
    chain = offered((1, 2), (3, 4, 5, 6, 7, 8), 0.2)
    assert 0 < len(chain) < 6
    assert offered((1, 2), (3, 4, 5, 6, 7, 8), 0.99) == [3, 4, 5, 6, 7, 8]


def test_nothing_is_expected_of_heads_behind_a_stop_token() -> None:
    acceptance = Acceptance()
    sampling = SamplingParams(max_tokens=50, temperature=0.0, stop_token_ids=[STOP])
    sequence = Sequence(Submit("a", (1, 2), sampling, drafting=Drafting("heads"), seed=0), 0.0)
    sequence.head_drafts = HeadDrafts(2, (3, STOP, 5), (0.9,) * 3, (0,) * 3)
    Proposer(acceptance, 1_000, NO_TEXT).chain(sequence)
    assert list(acceptance.expected(Drafter("heads", sequence.key), 3)[0][1:]) == [0.0, 0.0]
