"""The form of tool calls that a chat template writes, learned by asking it to write some.

No model is known by name: the template renders sample calls, and the text around their names and
arguments is the form. What is learned is tried: calls that the template writes must be read back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from quickchange_server.frontend.parsing.tool_forms import (
    KEY,
    OWN,
    JsonCall,
    Middle,
    NamedCall,
    ParameterMarks,
    ToolForm,
)
from quickchange_server.frontend.parsing.tool_parser import ToolReader

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Messages, bool], str]
"""Text of (messages, tools, add_generation_prompt). Raises jinja2.TemplateError."""

Json = dict[str, Any]

_FIRST, _SECOND = "probe_tool", "other_tool"
_KEYS = ("probe_key", "other_key", "third_key")
_ARGUMENTS: Json = dict(zip(_KEYS, ("probe_value", "other_value", "third_value"), strict=True))
_SAID = "probe_content"
_ASKED = {"role": "user", "content": "probe_question"}
_ANSWERED = {"role": "assistant", "content": _SAID}
_IDS = ("call00000", "call11111")  # nine letters and digits, as the strictest template demands
_DECODER = json.JSONDecoder()
_LEXEMES = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\s+|\w+|.", re.DOTALL)
_NUMBER = re.compile(r"\d+")
_PADDING = re.compile(r"[ \t]{3,}")  # a template's own indentation

# Values that are no text, by their keys: how each is written, as a regular expression.
_OTHERS: dict[str, tuple[Any, str]] = {
    "integer_key": (731731, "731731"),
    "boolean_key": (True, "[Tt]rue"),
    "object_key": ({"inner_key": 731731}, r"\{"),
    "array_key": ([731731], r"\["),
}
_SCHEMA: Json = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in _ARGUMENTS},
        **{key: {"type": key.removesuffix("_key")} for key in _OTHERS},
    },
}
_TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "probe_description", "parameters": _SCHEMA},
    }
    for name in (_FIRST, _SECOND)
]


def tool_form(render: Render, ends: Collection[str] = ()) -> ToolForm | None:
    """The form of calls in a chat template; None if it takes no tools or can't be read back.

    `ends`: special tokens that end an answer, which its text never contains.
    """
    for from_text in (False, True):
        turns = _Turns.of(render, ends, from_text)
        if turns is None:
            continue
        for form in (_json_form(turns), _named_form(turns)):
            if form is not None and _reads_back(turns, form):
                return replace(form, from_text=from_text)
    return None


def with_arguments(message: Mapping[str, Any], *, as_text: bool) -> Json:
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


def _object(function: Mapping[str, Any]) -> Json:
    given = function["arguments"]
    return given if isinstance(given, dict) else {}


Call = tuple[str, Json]


@dataclass(frozen=True, slots=True)
class _Turns:
    """An assistant's turns as the template writes them, without what is around every turn."""

    render: Render
    ends: Collection[str]
    from_text: bool
    opening: str
    before: str
    after: str

    @classmethod
    def of(cls, render: Render, ends: Collection[str], from_text: bool) -> _Turns | None:
        """None if the template takes no tools, or no messages."""
        try:
            opening = render([_ASKED], _TOOLS, True)
            answered = render([_ASKED, _ANSWERED], _TOOLS, False)
        except TemplateError:
            return None
        if _FIRST not in opening or _SAID not in answered:
            return None
        before, _, after = answered.rpartition(_SAID)
        return cls(render, ends, from_text, opening, before, after)

    def calling(self, *calls: Call) -> str | None:
        """The text of a turn with these calls; None if the template refuses it."""
        written = [
            {"id": own, "type": "function", "function": {"name": name, "arguments": arguments}}
            for own, (name, arguments) in zip(_IDS, calls, strict=False)
        ]
        message = {"role": "assistant", "content": "", "tool_calls": written}
        try:
            called = self.render(
                [_ASKED, with_arguments(message, as_text=self.from_text)], _TOOLS, False
            )
        except TemplateError:
            return None
        # Text around every message of the assistant, such as an empty thought, is no part of it.
        begun = max(_begun(self.opening, called), _begun(self.before, called))
        turn = called[begun:].removesuffix(self.after)
        cut = min((turn.find(end) for end in self.ends if end in turn), default=len(turn))
        return _PADDING.sub("", turn[:cut]).strip()


def _begun(usual: str, called: str) -> int:
    """Length of a text's beginning that is usual: whole words and marks, blanks apart."""
    if called.startswith(usual):
        return len(usual)
    expected = iter(_LEXEMES.findall(usual))
    length = 0
    for lexeme in _LEXEMES.finditer(called):
        if lexeme[0].isspace():
            continue
        if lexeme[0] != next((one for one in expected if not one.isspace()), None):
            break
        length = lexeme.end()
    return length


# Calls that are JSON objects.


def _json_form(turns: _Turns) -> ToolForm | None:
    one = turns.calling((_FIRST, _ARGUMENTS))
    found = None if one is None else _json_call(one, _FIRST)
    if one is None or found is None:
        return None
    start, end, call = found
    head, tail = one[:start], one[end:]
    if _FIRST in head + tail:
        return None
    between = None
    two = None if call.listed else turns.calling((_FIRST, _ARGUMENTS), (_SECOND, _ARGUMENTS))
    if two is not None:
        first, second = _json_call(two, _FIRST), _json_call(two, _SECOND)
        if first is not None and second is not None:
            between = two[first[1] : second[0]]
    several = call.listed or between is not None
    return _divided(call, head, tail, between, several=several)


def _json_call(text: str, name: str) -> tuple[int, int, JsonCall] | None:
    """The first JSON value that is the call, or a list of it alone: start, end, and its form."""
    for start, end, value in _values(text):
        call = value[0] if isinstance(value, list) and value else value
        name_path, arguments_path = _path(call, name), _path(call, _ARGUMENTS)
        if name_path and arguments_path:
            return start, end, JsonCall(name_path, arguments_path, isinstance(value, list))
    return None


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


# Calls with their name outside of the arguments.


@dataclass(frozen=True, slots=True)
class _Cut:
    """A text cut at the name of its first call and what its arguments consist of."""

    head: str
    first: str  # before the arguments, or before the first key
    keyed: tuple[str, str] | None  # between a key and its value, and that and the next key
    tail: str  # all that is behind the arguments, or behind the last value


def _named_form(turns: _Turns) -> ToolForm | None:
    one = turns.calling((_FIRST, _ARGUMENTS))
    cut = None if one is None else _cut(one, _FIRST)
    if cut is None:
        return None
    call, closes = _named_call(turns, cut)
    if call is None:
        return None
    middle, between = call.middle, None
    two = turns.calling((_FIRST, _ARGUMENTS), (_SECOND, _ARGUMENTS))
    first = None if two is None else _cut(two, _FIRST)
    behind = None if first is None else first.tail.removeprefix(closes)
    if behind is not None and (second := _cut(behind, _SECOND)) is not None:
        between = second.head
        opens = call.arguments.open if isinstance(call.arguments, ParameterMarks) else ""
        middle = _alike(middle, second.first.removesuffix(opens))
    call = replace(call, middle=_owned(middle))
    tail = cut.tail.removeprefix(closes)
    return _divided(call, cut.head, tail, between, several=between is not None)


def _cut(text: str, name: str) -> _Cut | None:
    """The parts of a text; None if there is no call with its name outside of its arguments."""
    head, found, rest = text.partition(name)
    if not found or name in rest or any(key in head for key in _KEYS):
        return None
    for start, end, value in _values(rest):
        if value == _ARGUMENTS and not rest[:start].rstrip().endswith("{"):
            return _Cut(head, rest[:start], None, rest[end:])
    texts = []  # before a key, and between it and its value, in turn
    for text_of_one in (text for item in _ARGUMENTS.items() for text in item):
        before, found, rest = rest.partition(text_of_one)
        if not found:
            return None
        texts.append(before)
    first, middle, second, *more = texts
    between = second.replace(_KEYS[0], KEY)  # a key may stand behind its value once more
    if more != [middle, between.replace(KEY, _KEYS[1]), middle]:
        return None
    return _Cut(head, first, (middle, between), rest)


def _named_call(turns: _Turns, cut: _Cut) -> tuple[NamedCall | None, str]:
    """The form of a call, and the beginning of its tail that belongs to its arguments."""
    if cut.keyed is None:
        return NamedCall(cut.first, "json"), ""
    middle, between = cut.keyed
    closing = re.match(r"[\"']?\)", cut.tail)
    if cut.first.strip() == "(" and middle.strip("\"' ") == "=" and closing is not None:
        return NamedCall(cut.first, "python"), closing[0]
    opens = _common_end(cut.first, between)
    separator = between.removesuffix(opens)
    close = _common_start(cut.tail.replace(_KEYS[-1], KEY), separator)
    form = ParameterMarks(opens, ((middle, "either"),), close, separator.removeprefix(close))
    known = None if not close.strip() or not middle.strip() else _with_kinds(turns, form)
    call = None if known is None else NamedCall(cut.first.removesuffix(opens), known)
    return call, close.replace(KEY, _KEYS[-1])


def _with_kinds(turns: _Turns, form: ParameterMarks) -> ParameterMarks | None:
    """The form with the texts that stand before values of other types; None if those have another
    form altogether."""
    (middle, _), *_ = form.middles
    other = _KEYS[0]
    found: dict[str, None] = {}
    for key, (value, pattern) in _OTHERS.items():
        follows = form.close.replace(KEY, key) + form.separator + form.open + other
        text = turns.calling((_FIRST, {key: value, other: ""}))
        written, ended, _ = ("" if text is None else text).partition(key)[2].partition(follows)
        begun = re.search(pattern, written)
        if not ended or begun is None:
            return None
        found[written[: begun.start()]] = None
    if list(found) == [middle]:
        return form
    others: list[Middle] = [(text, "json") for text in found if text != middle]
    return replace(form, middles=((middle, "text"), *others))


def _alike(first: str, second: str) -> str:
    """The text of two calls, with what differs as each call's own, if that is an id or a number."""
    one, two = _owned(first), _owned(second)
    if one != two and _NUMBER.sub(OWN, one) == _NUMBER.sub(OWN, two):
        return _NUMBER.sub(OWN, one)
    return one


def _owned(text: str) -> str:
    """The text with ids as each call's own."""
    for own in _IDS:
        text = text.replace(own, OWN)
    return text


def _divided(
    call: JsonCall | NamedCall, head: str, tail: str, between: str | None, *, several: bool
) -> ToolForm:
    """The form with these texts before the first call, behind the last, and between two calls."""
    head, tail = _owned(head).lstrip(), _owned(tail).rstrip()
    if between is None:
        return ToolForm(call, open=head, close=tail, several=several)
    between = _owned(between)
    opens = _common_end(head, between)
    separator = between.removesuffix(opens)
    close = _common_start(tail, separator)
    return ToolForm(
        call,
        begin=head.removesuffix(opens),
        open=opens,
        close=close,
        separator=separator.removeprefix(close),
        end=tail.removeprefix(close),
        several=several,
    )


def _common_start(left: str, right: str) -> str:
    """The whole words, marks and blanks that two texts both begin with."""
    pairs = zip(_LEXEMES.findall(left), _LEXEMES.findall(right), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _common_end(left: str, right: str) -> str:
    """The whole words, marks and blanks that two texts both end with."""
    lefts, rights = _LEXEMES.findall(left), _LEXEMES.findall(right)
    pairs = zip(reversed(lefts), reversed(rights), strict=False)
    return "".join([one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1])


def _reads_back(turns: _Turns, form: ToolForm) -> bool:
    """True if calls that the template writes are read back as they were."""
    arguments = {**_ARGUMENTS, **{key: value for key, (value, _) in _OTHERS.items()}}
    if isinstance(form.call, NamedCall) and form.call.arguments == "python":
        arguments = _ARGUMENTS  # Python is known whatever the template makes of other values
    calls = [(_FIRST, arguments), (_SECOND, _ARGUMENTS)][: 1 + form.several]
    text = turns.calling(*calls)
    if text is None:
        return False
    reader = ToolReader(form, {_FIRST: _SCHEMA, _SECOND: _SCHEMA})
    said, pieces = reader.push(text, final=True)
    try:
        read = [(piece.name, json.loads(piece.arguments)) for piece in pieces]
    except ValueError:
        return False
    return not said.strip() and read == calls
