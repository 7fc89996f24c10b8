"""Tool calls in a model's own words: how its chat template writes them, and how to read them back.

No model is known by name. The template is asked to write a call, and calls are recognised by the
text that it puts around the JSON. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from quickchange_server.frontend.stop_strings import StopScanner

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Messages, bool], str]
"""Text of (messages, tools, add_generation_prompt). Raises jinja2.TemplateError."""

_NAME, _KEY, _VALUE, _SAID = "probe_tool", "probe_key", "probe_value", "probe_content"
_ARGUMENTS = {_KEY: _VALUE}
_ASKED = {"role": "user", "content": "probe_question"}
_ANSWERED = {"role": "assistant", "content": _SAID}
_ID = "call00000"  # nine letters and digits: the strictest template asks for that
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": _ID,
            "type": "function",
            "function": {"name": _NAME, "arguments": _ARGUMENTS},
        }
    ],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe_description",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls: `begin`, a JSON object or a list of them, `end`."""

    begin: str  # "": the JSON is the whole answer
    end: str
    listed: bool  # the JSON is a list of calls
    name_path: tuple[str, ...]  # keys down to the function's name
    arguments_path: tuple[str, ...]
    from_text: bool = False  # the template takes a call's arguments as text, not as an object

    def calls(self, value: Any, names: Collection[str]) -> list[ToolCall] | None:
        """The calls that a JSON value stands for; None where it is anything else, or names a
        function that is not one of `names`."""
        items = value if isinstance(value, list) else [value]
        calls = [self._call(item) for item in items]
        known = [call for call in calls if call is not None and call.name in names]
        return known if known and len(known) == len(calls) else None

    def _call(self, value: Any) -> ToolCall | None:
        name, arguments = _at(value, self.name_path), _at(value, self.arguments_path)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def tool_format(render: Render) -> ToolFormat | None:
    """How a chat template writes calls; None where it takes no tools, or does not write JSON."""
    return _learned(render, from_text=False) or _learned(render, from_text=True)


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a template that takes the arguments of its calls as text."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _learned(render: Render, *, from_text: bool) -> ToolFormat | None:
    call = with_text_arguments(_CALLED) if from_text else _CALLED
    try:
        opening = render([_ASKED], [_TOOL], True)
        answered = render([_ASKED, _ANSWERED], [_TOOL], False)
        called = render([_ASKED, call], [_TOOL], False)
    except TemplateError:
        return None
    if _NAME not in opening or _SAID not in answered:
        return None
    # What stands before and behind every message of the assistant's, such as an empty thought, is
    # no part of a call.
    before, _, after = answered.rpartition(_SAID)
    begun = max(_shared(opening, called), _shared(before, called))
    tail = called[begun:].removesuffix(after)
    for start, end, value in _values(tail):
        call = value[0] if isinstance(value, list) and value else value
        name_path, arguments_path = _path(call, _NAME), _path(call, _ARGUMENTS)
        if name_path and arguments_path:
            begin, finish = tail[:start].strip(), tail[end:].strip()
            if any(own in begin + finish for own in (_ID, _NAME)):
                return None  # not the same for every call
            listed = isinstance(value, list)
            return ToolFormat(begin, finish, listed, name_path, arguments_path, from_text)
    return None


def _shared(left: str, right: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Every JSON object or list in a text, the outer ones first: (start, end, value)."""
    for start, character in enumerate(text):
        if character in "{[":
            try:
                value, end = _DECODER.raw_decode(text, start)
            except json.JSONDecodeError:
                continue
            yield start, end, value


def _path(value: Any, wanted: Any) -> tuple[str, ...] | None:
    """The keys down to `wanted` in nested objects; None where it is not there."""
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        if inner == wanted:
            return (key,)
        deeper = _path(inner, wanted)
        if deeper is not None:
            return (key, *deeper)
    return None


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


class ToolReader:
    """Tells calls from text in what one choice writes, as it comes.

    Text that may be part of a call is held back; what turns out to be none is text after all, so
    nothing is lost.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._scanner = StopScanner([form.begin] if form.begin else ())
        self._call: str | None = None if form.begin else ""  # what has come since `begin`

    def push(self, text: str, *, final: bool) -> tuple[str, list[ToolCall]]:
        """Add text; `final`: there is no more. Returns text that is certain, and whole calls."""
        said: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._call is None:
                text = self._outside(text, said, final=final)
            if self._call is None:
                return "".join(said), calls
            self._call += text
            rest = self._inside(said, calls, final=final)
            if rest is None:
                return "".join(said), calls
            text = rest

    def _outside(self, text: str, said: list[str], *, final: bool) -> str:
        """Take text up to the beginning of a call; what is behind it."""
        for index, character in enumerate(text):
            scanned = self._scanner.push(character)
            said.append(scanned.text)
            if scanned.stop is not None:
                self._call = ""
                return text[index + 1 :]
        if final:
            said.append(self._scanner.finish())
        return ""

    def _inside(self, said: list[str], calls: list[ToolCall], *, final: bool) -> str | None:
        """Take a call that is complete; what is behind it. None where more is needed."""
        held = self._call or ""
        start = len(held) - len(held.lstrip())
        if not self._form.begin and held[start : start + 1] not in ("", "{", "["):
            return self._no_call(held, len(held), said)
        try:
            value, end = _DECODER.raw_decode(held, start)
        except json.JSONDecodeError as error:
            wrong = self._wrong_until(held, error)
            if wrong is None and not final:
                return None
            return self._no_call(held, wrong or len(held), said)
        rest = held[end:].lstrip()
        if not final and len(rest) < len(self._form.end) and self._form.end.startswith(rest):
            return None
        found = self._form.calls(value, self._names)
        if found is None:
            return self._no_call(held, end, said)
        calls += found
        self._leave()
        return rest.removeprefix(self._form.end)

    def _wrong_until(self, held: str, error: json.JSONDecodeError) -> int | None:
        """Where a call that is not JSON ends; None while it may still become JSON."""
        if not self._form.end or error.msg.startswith("Unterminated string"):
            return None  # an end within a string is none
        end = held.find(self._form.end, error.pos)
        return None if end < 0 else end + len(self._form.end)

    def _no_call(self, held: str, length: int, said: list[str]) -> str:
        """The first characters held are text after all; the rest."""
        said.append(self._form.begin + held[:length])
        self._leave()
        return held[length:]

    def _leave(self) -> None:
        self._call = None
        self._scanner = StopScanner([self._form.begin] if self._form.begin else ())
