"""Tool calls in a model's text: the form that its chat template gives them, and their parser.

No model is known by name: the template renders a sample call, and the text around its JSON marks
calls from then on. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from quickchange_server.frontend.parsing.stop_strings import StopScanner

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Messages, bool], str]
"""Text of (messages, tools, add_generation_prompt). Raises jinja2.TemplateError."""

_NAME, _KEY, _VALUE, _SAID = "probe_tool", "probe_key", "probe_value", "probe_content"
_ARGUMENTS = {_KEY: _VALUE}
_ASKED = {"role": "user", "content": "probe_question"}
_ANSWERED = {"role": "assistant", "content": _SAID}
_ID = "call00000"  # nine letters and digits, as the strictest template demands
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
    """The form of a model's calls: `begin`, a JSON object or a list of them, `end`."""

    begin: str  # "": the JSON is the whole answer
    end: str
    listed: bool  # the JSON is a list of calls
    name_path: tuple[str, ...]  # keys down to the function's name
    arguments_path: tuple[str, ...]
    from_text: bool = False  # the template takes a call's arguments as text, not as an object

    def calls(self, value: Any, names: Collection[str]) -> list[ToolCall] | None:
        """The calls in a JSON value; None if it is not calls of functions among `names`."""
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
    """The form of calls in a chat template; None if it takes no tools or writes no JSON."""
    return _learned(render, from_text=False) or _learned(render, from_text=True)


def with_arguments(message: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """The message with its calls' arguments in the form that a template expects.

    A model may have written arguments that are no object (cut off, empty): a template that takes
    text gets them as they are, one that takes an object gets an empty one.
    """
    formed = _text if as_text else _object
    calls = [
        {**call, "function": {**call["function"], "arguments": formed(call["function"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _text(function: Mapping[str, Any]) -> str:
    given = function["arguments"]
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _object(function: Mapping[str, Any]) -> dict[str, Any]:
    given = function["arguments"]
    return given if isinstance(given, dict) else {}


def _learned(render: Render, *, from_text: bool) -> ToolFormat | None:
    call = with_arguments(_CALLED, as_text=from_text)
    try:
        opening = render([_ASKED], [_TOOL], True)
        answered = render([_ASKED, _ANSWERED], [_TOOL], False)
        called = render([_ASKED, call], [_TOOL], False)
    except TemplateError:
        return None
    if _NAME not in opening or _SAID not in answered:
        return None
    # Text around every message of the assistant, such as an empty thought, is not part of a call.
    before, _, after = answered.rpartition(_SAID)
    begun = max(_shared(opening, called), _shared(before, called))
    tail = called[begun:].removesuffix(after)
    for start, end, value in _values(tail):
        call = value[0] if isinstance(value, list) and value else value
        name_path, arguments_path = _path(call, _NAME), _path(call, _ARGUMENTS)
        if name_path and arguments_path:
            begin, finish = tail[:start].strip(), tail[end:].strip()
            if any(own in begin + finish for own in (_ID, _NAME)):
                return None  # marks that differ between calls
            listed = isinstance(value, list)
            return ToolFormat(begin, finish, listed, name_path, arguments_path, from_text)
    return None


def _shared(left: str, right: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """JSON objects and lists in a text, outer ones first: (start, end, value)."""
    for start, character in enumerate(text):
        if character in "{[":
            try:
                value, end = _DECODER.raw_decode(text, start)
            except json.JSONDecodeError:
                continue
            yield start, end, value


def _path(value: Any, wanted: Any) -> tuple[str, ...] | None:
    """The path of keys to `wanted` in nested objects; None if it is not there."""
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
    """Incremental parser that separates the calls of one choice from its text.

    Text that may be part of a call is held back, and returned as text if it turns out to be none.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._scanner = StopScanner([form.begin] if form.begin else ())
        # Text since `begin`; None outside a call.
        self._call: str | None = None if form.begin else ""

    def push(self, text: str, *, final: bool) -> tuple[str, list[ToolCall]]:
        """Add text, the last if `final`. Returns text that is certain, and complete calls."""
        plain: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._call is None:
                text = self._outside(text, plain, final=final)
            if self._call is None:
                return "".join(plain), calls
            self._call += text
            rest = self._inside(plain, calls, final=final)
            if rest is None:
                return "".join(plain), calls
            text = rest

    def _outside(self, text: str, plain: list[str], *, final: bool) -> str:
        """Consume text up to the beginning of a call; returns the rest."""
        for index, character in enumerate(text):
            scanned = self._scanner.push(character)
            plain.append(scanned.text)
            if scanned.stop is not None:
                self._call = ""
                return text[index + 1 :]
        if final:
            plain.append(self._scanner.finish())
        return ""

    def _inside(self, plain: list[str], calls: list[ToolCall], *, final: bool) -> str | None:
        """Consume a complete call; returns the rest, None if the call needs more text."""
        held = self._call or ""
        start = len(held) - len(held.lstrip())
        if not self._form.begin and held[start : start + 1] not in ("", "{", "["):
            return self._no_call(held, len(held), plain)
        try:
            value, end = _DECODER.raw_decode(held, start)
        except json.JSONDecodeError as error:
            wrong = self._wrong_until(held, error)
            if wrong is None and not final:
                return None
            return self._no_call(held, wrong or len(held), plain)
        rest = held[end:].lstrip()
        if not final and len(rest) < len(self._form.end) and self._form.end.startswith(rest):
            return None
        found = self._form.calls(value, self._names)
        if found is None:
            return self._no_call(held, end, plain)
        calls += found
        self._leave()
        return rest.removeprefix(self._form.end)

    def _wrong_until(self, held: str, error: json.JSONDecodeError) -> int | None:
        """Index where a call that is not JSON ends; None while it may still become JSON."""
        if not self._form.end or error.msg.startswith("Unterminated string"):
            return None  # an `end` within a string doesn't count
        end = held.find(self._form.end, error.pos)
        return None if end < 0 else end + len(self._form.end)

    def _no_call(self, held: str, length: int, plain: list[str]) -> str:
        """Return the first `length` held characters to the text; returns the rest."""
        plain.append(self._form.begin + held[:length])
        self._leave()
        return held[length:]

    def _leave(self) -> None:
        self._call = None
        self._scanner = StopScanner([self._form.begin] if self._form.begin else ())
