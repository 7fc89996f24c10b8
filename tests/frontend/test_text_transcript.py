"""From deltas to text: endings, stop tokens, min_tokens, log-probabilities."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from text_support import END, byte_text

from quickchange_server.frontend.output_processor import Piece, Transcript
from quickchange_server.protocol import Delta, SamplingParams, TokenLogprobs

TEXT = byte_text()


def deltas_of(ids: list[int], sizes: list[int], finish: Any, logprobs: bool) -> list[Delta]:
    """The ids in deltas of the given sizes, the rest in one."""
    deltas, start = [], 0
    for size in [*sizes, len(ids)]:
        part = tuple(ids[start : start + size])
        start += size
        logged = tuple(TokenLogprobs(i, -0.5) for i in part) if logprobs else ()
        last = start >= len(ids)
        deltas.append(Delta("r", part, logged, finish if last else None))
        if last:
            break
    return deltas


def transcribe(
    ids: list[int],
    options: SamplingParams,
    finish: str = "length",
    sizes: list[int] | None = None,
    logprobs: bool = False,
) -> tuple[list[Piece], Transcript]:
    transcript = Transcript(TEXT, options)
    pieces = []
    for delta in deltas_of(ids, [1] * len(ids) if sizes is None else sizes, finish, logprobs):
        pieces.append(transcript.push(delta))
        if pieces[-1].ending is not None:
            break
    return pieces, transcript


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.sampled_from([97, 98, 10, 0xC3, 0xA9, END]), min_size=1, max_size=16),
    sizes=st.lists(st.integers(1, 4), max_size=16),
    stop=st.sampled_from([(), ("ab",), ("é", "\n\n")]),
    min_tokens=st.integers(0, 4),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    finish=st.sampled_from(["length", "stop"]),
)
def test_the_text_does_not_depend_on_how_deltas_are_grouped(
    ids: list[int], sizes: list[int], finish: str, **wanted: Any
) -> None:
    options = SamplingParams(**wanted, stop_token_ids=frozenset(ids[-1:]))
    singly, alone = transcribe(ids, options, finish, logprobs=True)
    grouped, together = transcribe(ids, options, finish, sizes=sizes, logprobs=True)
    assert text_of(singly) == text_of(grouped)
    assert singly[-1].ending == grouped[-1].ending
    assert [t for p in singly for t in p.tokens] == [t for p in grouped for t in p.tokens]
    assert alone.completion_tokens == together.completion_tokens


def test_a_stop_string_ends_the_choice_before_it() -> None:
    pieces, transcript = transcribe(list(b"one. two"), SamplingParams(stop=(". ",)))
    assert text_of(pieces) == "one"
    assert pieces[-1].ending == "stop"
    assert transcript.completion_tokens == 5


def test_the_stop_string_is_kept_where_asked_for() -> None:
    pieces, _ = transcribe(
        list(b"one. two"), SamplingParams(stop=(". ",), include_stop_str_in_output=True)
    )
    assert text_of(pieces) == "one. "


def test_stop_strings_count_only_after_min_tokens() -> None:
    pieces, _ = transcribe(list(b"a.b.c"), SamplingParams(stop=(".",), min_tokens=2))
    assert text_of(pieces) == "a.b"


def test_a_stop_token_is_not_part_of_the_text() -> None:
    options = SamplingParams(stop_token_ids=frozenset({ord("!")}))
    pieces, transcript = transcribe(list(b"ab!"), options, finish="stop")
    assert text_of(pieces) == "ab"
    assert transcript.completion_tokens == 3


def test_a_stop_token_is_kept_where_asked_for() -> None:
    options = SamplingParams(stop_token_ids=frozenset({ord("!")}), include_stop_str_in_output=True)
    pieces, _ = transcribe(list(b"ab!"), options, finish="stop")
    assert text_of(pieces) == "ab!"


def test_a_character_cut_off_by_the_length_is_a_replacement() -> None:
    pieces, _ = transcribe([97, 0xC3], SamplingParams())
    assert text_of(pieces) == "a\ufffd"


def test_log_probabilities_come_with_their_text_and_offset() -> None:
    pieces, _ = transcribe(list("aéb".encode()), SamplingParams(), logprobs=True)
    found = [[(t.offset, t.logprobs.token_id) for t in piece.tokens] for piece in pieces]
    assert found == [[(0, 97)], [], [(1, 0xC3), (1, 0xA9)], [(2, 98)]]


def test_log_probabilities_behind_a_stop_string_are_dropped_with_their_text() -> None:
    pieces, _ = transcribe(list(b"ab.c"), SamplingParams(stop=(".",)), logprobs=True)
    assert [t.logprobs.token_id for p in pieces for t in p.tokens] == [97, 98]


def test_accepted_tokens_behind_a_stop_string_are_not_counted() -> None:
    transcript = Transcript(TEXT, SamplingParams(stop=(".",)))
    transcript.push(Delta("r", tuple(b"ab"), drafted=4, accepted=1))
    piece = transcript.push(Delta("r", tuple(b"c.def"), drafted=4, accepted=4))
    assert (piece.text, piece.ending) == ("c", "stop")
    counts = transcript.completion_tokens, transcript.drafted_tokens, transcript.accepted_tokens
    assert counts == (4, 8, 3)
