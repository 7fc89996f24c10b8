"""Forms of tool calls: the literal text around a call, its name and its arguments.

A form is data, learned from a chat template (tool_learning.py). The reader (tool_parser.py) and the
grammars of calls both follow it. Where literal text has blanks, a reader takes any blanks or none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

OWN = "\0"  # within literal text: an id or a number that is each call's own
KEY = "\1"  # within the text behind a value: its key once more, as in <city>Porto</city>

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_WORD = re.compile(rf"[^\s{OWN}]*")


# A text between key and value, and what it makes of the value: text, JSON, or either, as the
# function's schema says.
Middle = tuple[str, Literal["text", "json", "either"]]


@dataclass(frozen=True, slots=True)
class JsonCall:
    """A call that is one JSON object, with its name and its arguments inside."""

    name_path: tuple[str, ...]  # keys down to the function's name
    arguments_path: tuple[str, ...]
    listed: bool = False  # the calls are one JSON list


@dataclass(frozen=True, slots=True)
class ParameterMarks:
    """Arguments written one by one: `open` key `middle` value `close`."""

    open: str
    middles: tuple[Middle, ...]
    close: str
    separator: str = ""


@dataclass(frozen=True, slots=True)
class NamedCall:
    """A call that is its function's name, `middle`, and its arguments: a JSON object, Python's
    keyword arguments up to a bracket, or parameters."""

    middle: str
    arguments: Literal["json", "python"] | ParameterMarks


@dataclass(frozen=True, slots=True)
class ToolForm:
    """The form of a model's calls: `begin` (`open` call `close` `separator`)+ `end`.

    With neither `begin` nor `end` each call stands for itself, between `open` and `close`.
    """

    call: JsonCall | NamedCall
    begin: str = ""
    open: str = ""
    close: str = ""
    separator: str = ""
    end: str = ""
    several: bool = True  # False: the template takes one call a message at most
    from_text: bool = False  # the template takes a call's arguments as text, not as an object

    @property
    def sectioned(self) -> bool:
        """True if calls stand together between `begin` and `end`."""
        return bool(self.begin or self.end)

    @property
    def head(self) -> str:
        """The literal text before the first call."""
        return self.begin + self.open

    @property
    def mark(self) -> str:
        """The beginning of `head` that no usual text has; "": calls are the whole answer."""
        tag = _TAG.match(self.head) or _WORD.match(self.head)
        found = "" if tag is None else tag[0]
        return found if any(character.isalpha() for character in found) else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All of its literal text."""
        texts = [self.begin, self.open, self.close, self.separator, self.end]
        if isinstance(self.call, NamedCall):
            texts.append(self.call.middle)
            if isinstance(parameters := self.call.arguments, ParameterMarks):
                texts += [parameters.open, parameters.close, parameters.separator]
                texts += [middle for middle, _ in parameters.middles]
        return tuple(text for text in texts if text)


def last_tag(text: str) -> str:
    """The mark that a literal text ends with; "" if it ends with none."""
    tags = list(_TAG.finditer(text.rstrip()))
    return tags[-1][0] if tags and tags[-1].end() == len(text.rstrip()) else ""
