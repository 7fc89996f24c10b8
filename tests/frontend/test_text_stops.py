"""Stop strings over a stream."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.frontend.parsing.stop_strings import StopScanner

letters = st.text("ab", min_size=1, max_size=4)


def scan(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    """All text emitted, and the stop string found."""
    scanner = StopScanner(stops, include=include)
    text = ""
    for piece in pieces:
        scanned = scanner.push(piece)
        text += scanned.text
        if scanned.stop is not None:
            return text, scanned.stop
    return text + scanner.finish(), None


def by_hand(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The shortest beginning of the text that ends in a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stops=st.lists(letters, min_size=1, max_size=3),
    include=st.booleans(),
)
def test_any_cutting_into_pieces_ends_at_the_first_stop_string(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    assert scan(pieces, stops, include) == by_hand("".join(pieces), stops, include)


@given(pieces=st.lists(letters, max_size=6), stop=letters)
def test_no_part_of_a_stop_string_is_emitted_before_it_is_certain(
    pieces: list[str], stop: str
) -> None:
    scanner = StopScanner([stop])
    emitted, pushed = "", ""
    for piece in pieces:
        pushed += piece
        scanned = scanner.push(piece)
        emitted += scanned.text
        if scanned.stop:
            break
        held = len(pushed) - len(emitted)
        assert held == max(n for n in range(len(stop)) if pushed.endswith(stop[:n]))


def test_held_text_comes_out_at_the_end() -> None:
    assert scan(["Hello\n"], ["\n\n"]) == ("Hello\n", None)


def test_a_stop_string_over_several_pieces_is_found() -> None:
    assert scan(["Hel", "lo\n", "\nmore"], ["\n\n"]) == ("Hello", "\n\n")


def test_of_several_that_complete_together_the_longest_counts() -> None:
    assert scan(["xabc"], ["bc", "abc"]) == ("x", "abc")


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopScanner([]).push("abc").text == "abc"
