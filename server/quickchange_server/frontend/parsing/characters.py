"""Characters of a text as they come, for parsers that are generators: one character a step."""

from __future__ import annotations

import json
from collections.abc import Generator

from quickchange_server.frontend.parsing.tool_forms import OWN

Reading = Generator[None, str, None]

_OWN_CHARACTERS = frozenset("_-.:")  # of an id, besides letters and digits


class NoCallError(Exception):
    """What was read is no call."""


class Characters:
    """A text's characters, some of which were put back. Each method reads from the next one on."""

    def __init__(self) -> None:
        self._back: list[str] = []  # the last first
        self.ended = False

    @property
    def back(self) -> str:
        """What was put back."""
        return "".join(reversed(self._back))

    def put_back(self, text: str) -> None:
        self._back += reversed(text)

    def drop(self) -> str:
        """Forget what was put back, and return it."""
        text = self.back
        self._back = []
        return text

    def next(self) -> Generator[None, str, str]:
        """The next character; "" at the end of the text."""
        if self._back:
            return self._back.pop()
        character = yield
        self.ended = not character
        return character

    def peek(self) -> Generator[None, str, str]:
        """The next character that is no blank, which stays; the blanks are gone."""
        while (character := (yield from self.next())).isspace():
            pass
        self.put_back(character)
        return character

    def match(self, *options: str, cut: bool = False) -> Generator[None, str, int | None]:
        """The index of the longest option that the text goes on with, blanks apart.

        None: of none, and nothing is consumed. `cut`: at the end of the text a part of one option,
        and of no other, is taken for all of it.
        """
        wanted = ["".join(option.split()) for option in options]
        states = dict.fromkeys(range(len(wanted)), 0)
        best, length, taken = None, 0, ""
        while states:
            for index, place in states.items():
                if wanted[index][place:] in ("", OWN):
                    best, length = index, len(taken)
            if all(place == len(wanted[index]) for index, place in states.items()):
                break
            character = yield from self.next()
            if not character:
                if cut and best is None and taken.strip() and len({wanted[i] for i in states}) == 1:
                    best, length = next(iter(states)), len(taken)
                break
            taken += character
            if not character.isspace():
                advanced = {
                    index: _advanced(wanted[index], place, character)
                    for index, place in states.items()
                }
                states = {i: place for i, place in advanced.items() if place is not None}
        self.put_back(taken[length:])
        return best

    def expect(self, text: str) -> Reading:
        """Read a literal text. Raises NoCallError if another follows."""
        if (yield from self.match(text)) is None:
            raise NoCallError

    def name(self) -> Generator[None, str, str]:
        """Letters, digits and lines."""
        yield from self.peek()
        name = ""
        while is_named(character := (yield from self.next())):
            name += character
        self.put_back(character)
        return name

    def json_string(self) -> Generator[None, str, str]:
        """A JSON string. Raises NoCallError if there is none, or not all of it."""
        if (yield from self.peek()) != '"':
            raise NoCallError
        text = yield from self.next()
        while True:
            character = yield from self.next()
            text += character
            if not character:
                raise NoCallError
            if character == "\\":
                text += yield from self.next()
            elif character == '"':
                break
        try:
            return str(json.loads(text, strict=False))
        except ValueError as error:
            raise NoCallError from error


def is_named(character: str) -> bool:
    """True for a character of a function's name."""
    return character.isalnum() or character in ("_", "-")


def _advanced(wanted: str, place: int, character: str) -> int | None:
    """The place in a literal text behind another character; None if that doesn't fit."""
    if place < len(wanted) and wanted[place] == OWN:
        if place + 1 < len(wanted) and wanted[place + 1] == character:
            return place + 2
        return place if character.isalnum() or character in _OWN_CHARACTERS else None
    return place + 1 if place < len(wanted) and wanted[place] == character else None
