"""Words of the prompt take the place of heads' drafts where they are likelier, and nowhere else."""

from __future__ import annotations

from quickchange_server.spec_decode.acceptance_rates import WORDS, Acceptance, Drafter
from quickchange_server.spec_decode.prompt_lookup import (
    GuidedChain,
    TokenText,
    WordGuide,
    WordLookup,
)

HEADS, BY_WORDS = Drafter("heads", b""), Drafter(WORDS, b"")
TEXT = TokenText(chr, lambda text: [ord(character) for character in text])
PROMPT = [ord(character) for character in "ship to Porto."]


def chain(*, lookup: bool = True, depth: int = 4) -> GuidedChain:
    """The guide of a sequence whose output so far is a quote; a token is a character."""
    words = WordLookup([*PROMPT, ord('"')], len(PROMPT), TEXT) if lookup else None
    return GuidedChain(words, HEADS, BY_WORDS, depth)


def drafted(one: GuidedChain, chance: float) -> str:
    """What is drafted behind a certain P, where the heads say x at every depth."""
    guide = WordGuide([one], Acceptance())
    guide.begin([ord("P")], [0])
    return "".join(chr(guide.revise([ord("x")], [chance])[0]) for _ in range(4))


def test_a_word_of_the_prompt_is_drafted_where_the_heads_are_unsure() -> None:
    one = chain()
    assert drafted(one, 0.05) == "orto"
    assert one.matches == [1, 2, 3, 4]


def test_heads_that_are_sure_are_left_alone() -> None:
    one = chain()
    assert drafted(one, 0.99) == "xxxx"
    assert one.matches == [0, 0, 0, 0]


def test_no_word_is_looked_for_beyond_the_depth_or_without_lookup() -> None:
    assert drafted(chain(depth=2), 0.05) == "orxx"
    assert drafted(chain(lookup=False), 0.05) == "xxxx"


def test_drafts_accepted_in_the_same_step_are_read_before_the_certain_token() -> None:
    words = WordLookup([*PROMPT, ord('"')], len(PROMPT), TEXT)
    verified = tuple(ord(character) for character in "Porx")
    guide = WordGuide([one := GuidedChain(words, HEADS, BY_WORDS, 2, verified)], Acceptance())
    guide.begin([ord("t")], [3])
    assert [guide.revise([ord("x")], [0.05]) for _ in range(2)] == [[ord("o")], [ord("x")]]
    assert one.matches == [4, 0]
