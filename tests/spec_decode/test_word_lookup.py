"""Words that an output copies are found in the prompt whatever tokens they are in there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from quickchange_server.spec_decode.prompt_lookup import LookupMatch, TokenText, WordLookup

PIECES = [
    *(" Kr", "ak", "ow", "K", "rak", '"', ": ", ",", "\n", ".", " in", "Ship", " blue", "blue"),
    *(" exten", "sion", " cord", "s", "A", "na", " Ana", " Ruiz", " Weber", "-", "2", "1"),
    *(" b", "b", "l", "u", "e", " K"),
]
IDS = {piece: index for index, piece in enumerate(PIECES)}


def encode(text: str) -> list[int]:
    """The longest piece each time, but words at the text's start only in their own tokens."""
    tokens = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        tokens.append(IDS[piece])
        text = text[len(piece) :]
    return tokens


TEXT = TokenText(PIECES.__getitem__, encode)


def ids(pieces: Sequence[str]) -> list[int]:
    return [IDS[piece] for piece in pieces]


def find(
    prompt: Sequence[str], output: Sequence[str], most: int = 8, after: Sequence[str] = ()
) -> tuple[list[str], int] | None:
    """The pieces found and the characters that matched."""
    lookup = WordLookup(ids([*prompt, *output]), len(prompt), TEXT)
    found: LookupMatch | None = lookup.find(most, ids(after))
    return None if found is None else ([PIECES[token] for token in found.tokens], found.match)


KRAKOW = ["Ship", " in", " Kr", "ak", "ow", "."]
CORD = [" blue", " exten", "sion", " cord", "s", "."]


def test_a_word_is_finished_in_the_tokens_that_it_has_behind_a_quote() -> None:
    assert find(KRAKOW, ['"', "K"]) == (["rak", "ow"], 1)
    assert find(KRAKOW, ['"', "K", "rak"]) == (["ow"], 4)


def test_the_words_after_it_follow_in_one_chain() -> None:
    assert find(CORD, ['"', "blue"]) == ([" exten", "sion", " cord", "s"], 4)


def test_most_bounds_what_is_found() -> None:
    assert find(CORD, ['"', "blue"], most=2) == ([" exten", "sion"], 4)
    assert find(CORD, ['"', "blue"], most=0) is None


def test_drafts_count_as_if_they_were_said() -> None:
    assert find(CORD, ['"'], after=["blue", " exten"]) == (["sion", " cord", "s"], 10)


@pytest.mark.parametrize(
    "output",
    [
        ['"'],  # no word begun
        ['"', "Ship", " in", " Kr", "ak", "ow"],  # the phrase ends here
        ['"', "l", "u", "e"],  # only the middle of a word
        ["s"],  # as well
        [],
    ],
)
def test_nothing_is_found_where_no_phrase_goes_on(output: list[str]) -> None:
    assert find([*KRAKOW, *CORD], output) is None


def test_what_the_output_says_in_other_tokens_than_the_tokenizer_is_left_alone() -> None:
    assert find(CORD, ['"', "b", "l", "u", "e"]) is None


def test_of_two_phrases_the_latest_is_followed() -> None:
    prompt = ["A", "na", " Ruiz", ".", " Ana", " Weber", "."]
    assert find(prompt, ['"', "A", "na"]) == ([" Weber"], 3)


def test_the_longest_run_of_words_decides() -> None:
    prompt = [" blue", " Ana", " Ruiz", ".", " Ana", " Weber", "."]
    assert find(prompt, ['"', "blue", " Ana"]) == ([" Ruiz"], 8)


def test_hyphens_join_words() -> None:
    assert find(["Ship", " in", " Kr", "ak", "ow", "-", "2", "."], ['"', "K"]) == (
        ["rak", "ow", "-", "2"],
        1,
    )
