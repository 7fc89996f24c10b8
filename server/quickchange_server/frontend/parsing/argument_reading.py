"""Arguments of a call, read in each of their syntaxes and told as a JSON object that grows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from quickchange_server.frontend.parsing.argument_values import (
    TEXT,
    from_literal,
    from_text,
    json_of,
    property_of,
    types_of,
)
from quickchange_server.frontend.parsing.characters import Characters, NoCallError, Reading
from quickchange_server.frontend.parsing.stop_strings import StopScanner
from quickchange_server.frontend.parsing.tool_forms import KEY, ParameterMarks

_OPENING, _CLOSING = "{[(", "}])"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What a tool call grows by: its name comes with its first piece alone."""

    index: int  # of the call within its message
    name: str | None
    arguments: str  # a part of the JSON object's text


@dataclass(slots=True)
class ToldCalls:
    """Calls as far as they are told."""

    tools: Any  # the schemas of the functions' parameters, by the functions' names
    count: int = 0
    _pieces: list[CallPiece] = field(default_factory=list)

    def open(self, name: str) -> None:
        """Tell another call's name."""
        self._pieces.append(CallPiece(self.count, name, ""))
        self.count += 1

    def grow(self, arguments: str) -> None:
        """Add to the last call's arguments."""
        last = self._pieces[-1] if self._pieces else None
        if last is not None and last.index == self.count - 1:
            name, before = self._pieces.pop().name, last.arguments
        else:
            name, before = None, ""
        self._pieces.append(CallPiece(self.count - 1, name, before + arguments))

    def take(self) -> list[CallPiece]:
        """What calls grew by since the last time, one piece a call."""
        taken, self._pieces = self._pieces, []
        return taken


class _Members:
    """The members of a call's arguments, told one by one."""

    def __init__(self, calls: ToldCalls, name: str) -> None:
        calls.open(name)
        self.grow = calls.grow
        self.count = 0
        self._schema = calls.tools[name]

    def begin(self, key: str) -> None:
        self.grow(("{" if not self.count else ", ") + json_of(key) + ": ")
        self.count += 1

    def close(self) -> None:
        self.grow("}" if self.count else "{}")

    def is_text(self, key: str) -> bool:
        """True if a value can be a string alone."""
        return types_of(property_of(self._schema, key), self._schema) == TEXT

    def from_text(self, key: str, text: str) -> None:
        self.grow(from_text(text, property_of(self._schema, key), self._schema))

    def from_literal(self, key: str, text: str, *, typed: bool = True) -> None:
        schema = property_of(self._schema, key) if typed else True
        self.grow(from_literal(text, schema, self._schema))


def json_value(characters: Characters, told: ToldCalls | None = None) -> Generator[None, str, str]:
    """The text of a JSON value, which is told as it comes if `told` is given, and else returned."""
    depth, quoted = 0, False
    kept = ""
    while character := (yield from characters.next()):
        if not depth and not quoted and (character in ",}]" or character.isspace()):
            characters.put_back(character)
            break
        text = character
        if quoted and character == "\\":
            text += yield from characters.next()
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "{[") - (character in "}]")
        if told is None:
            kept += text
        else:
            told.grow(text)
        if not depth and not quoted and character in '"}]':
            break
    return kept


def keywords(characters: Characters, told: ToldCalls, name: str) -> Reading:
    """Read Python's keyword arguments, and the bracket that closes the call."""
    members = _Members(told, name)
    while (character := (yield from characters.peek())) != ")":
        if not character:
            return
        if character == ",":
            yield from characters.next()
            continue
        key = yield from characters.name()
        if not key or (yield from characters.match("=")) is None:
            break
        yield from characters.peek()
        text, whole = yield from _expression(characters)
        if not whole:
            return
        members.begin(key)
        members.from_literal(key, text)
    yield from characters.match(")")
    members.close()


def _expression(characters: Characters) -> Generator[None, str, tuple[str, bool]]:
    """The text of a Python value, up to a comma or the call's bracket; false if it is cut off.

    What ends where its quote or its bracket does may be followed by anything: a template that
    leaves out commas has taught a model that.
    """
    text, quote, depth = "", "", 0
    while character := (yield from characters.next()):
        if not depth and not quote and character in ",)":
            characters.put_back(character)
            return text, True
        text += character
        if quote:
            if character == "\\":
                text += yield from characters.next()
            elif character == quote:
                quote = ""
                if not depth and text[0] == character:
                    return text, True
        else:
            if character in "\"'" and (depth or len(text) == 1):
                quote = character
            depth += (character in _OPENING) - (character in _CLOSING)
            if not depth and character in _CLOSING and text[0] in _OPENING:
                return text, True
    return text, False


def parameters(
    characters: Characters, told: ToldCalls, name: str, form: ParameterMarks, close: str
) -> Reading:
    """Read parameters up to the text that closes their call, which stays.

    Raises NoCallError if neither follows a name.
    """
    members: _Members | None = None
    while True:
        separator = form.separator if members is not None and members.count else ""
        before = separator + form.open
        options = [text for text in (close, before, form.open) if text.strip()]
        found = yield from characters.match(*options, cut=members is not None)
        if found is None and before.strip():
            break
        members = members or _Members(told, name)
        if found is not None and options[found] == close:
            members.close()
            characters.put_back(close)
            return
        key, kind = yield from _key(characters, form)
        if kind is None:
            break
        members.begin(key)
        yield from _value(characters, members, key, kind, form.close.replace(KEY, key))
    if members is None:
        raise NoCallError
    if characters.ended:
        characters.drop()  # half of what closes a value or opens the next
    else:
        members.close()


def _key(
    characters: Characters, form: ParameterMarks
) -> Generator[None, str, tuple[str, Literal["text", "json", "either"] | None]]:
    """A parameter's key, and what the text behind it makes of the value; None: there is none."""
    key = ""
    firsts = {middle.strip()[:1] for middle, _ in form.middles}
    while (character := (yield from characters.next())) not in {*firsts, "", "\n"}:
        key += character
    characters.put_back(character)
    found = yield from characters.match(*(middle for middle, _ in form.middles))
    if found is None:
        return key, None
    middle, kind = form.middles[found]
    for blank in middle[len(middle.rstrip()) :]:  # the form's own, not the value's
        character = yield from characters.next()
        if character != blank:
            characters.put_back(character)
            break
    return key.strip(), kind


def _value(characters: Characters, members: _Members, key: str, kind: str, close: str) -> Reading:
    """Read a value up to the text that closes it. Strings are told as they come."""
    blank = close[: len(close) - len(close.lstrip())]
    plain = kind == "text" or (kind == "either" and members.is_text(key))
    scanner = StopScanner([close.strip()])
    text, whole = "", False
    if plain:
        members.grow('"')
    while not whole and (character := (yield from characters.next())):
        scanned = scanner.push(character)
        text += scanned.text
        whole = scanned.stop is not None
        if plain and not whole and len(text) > len(blank):
            # What may be the form's own blanks, before the value's end, waits.
            sure = len(text) - len(blank)
            members.grow(json_of(text[:sure])[1:-1])
            text = text[sure:]
    text = text.removesuffix(blank) if whole else text + scanner.finish()
    if plain:
        members.grow(json_of(text)[1:-1] + '"' * whole)
    elif not whole:
        members.grow(text)
    elif kind == "json":
        members.from_literal(key, text, typed=False)
    else:
        members.from_text(key, text)
