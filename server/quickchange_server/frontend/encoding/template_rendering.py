"""Chat templates rendered as transformers renders them, to the byte, without transformers.

A template is a model's, so it is not trusted: it runs in Jinja's sandbox, and all that it sees is
made of plain values. Knows nothing of tokenizers' files or of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # a message's fields; the first leads
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "  # where a message that goes on ends

Chats = Sequence[Mapping[str, Any]]


def render(
    source: str,
    messages: Chats,
    *,
    tools: Chats | None,
    documents: Chats | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The prompt of a chat.

    continue_final_message: the last message's content goes on, or its field of that name. Raises
    what the template raises, and ValueError or TypeError for what it can't be given.
    """
    template = _compiled(source)
    if not messages:
        raise ValueError("a chat needs a message")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message goes with no generation prompt")
    # Many templates write "None" for a field without a value, and take one that is missing.
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    chat = [_with_thoughts(message) for message in _plain(given)]
    final = _marked(source, chat, continue_final_message) if continue_final_message else None
    rendered = template.render(
        messages=chat,
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
        **_plain(variables),
    )
    return rendered if final is None else _cut(rendered, final)


def template_of(found: str | Mapping[str, str] | None, *, tools: bool) -> str:
    """The template in use, of one or several by name. Raises ValueError where there is none."""
    if isinstance(found, str):
        return found
    names = ("tool_use", "default") if tools else ("default",)
    for name in names:
        if found and name in found:
            return found[name]
    raise ValueError("the tokenizer has no chat template, or several and none named default")


def _plain(value: Any) -> Any:
    """A copy in the types of JSON: methods of other types are none of a template's business."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return f"<{type(value).__name__}>"


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts under the names that templates read."""
    thought = next((message[name] for name in _THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _marked(source: str, chat: list[dict[str, Any]], field: bool | str) -> str:
    """Mark the end of the text that goes on; returns that text."""
    name = field if isinstance(field, str) else "content"
    last = chat[-1]
    final = last.get(name)
    if final is None:
        raise ValueError(f"continue_final_message: the last message has no {name!r}")
    fields = [name]
    if name in _THOUGHTS:  # each copy, whichever the template reads
        fields = [each for each in _THOUGHTS if last.get(each) == final]
    if not any(each in source for each in fields):
        raise ValueError(f"continue_final_message: the chat template reads no {name!r}")
    if not isinstance(final, (list, tuple)):
        for each in fields:
            last[each] += _CUT
        return str(final)
    for part in reversed(final):
        if "text" in part:
            text = part["text"]
            part["text"] += _CUT
            return str(text)
    raise ValueError("continue_final_message: the last message has no text")


def _cut(rendered: str, final: str) -> str:
    mark = _CUT.strip()
    if final.strip() not in rendered or mark not in rendered:
        raise ValueError("continue_final_message: the chat template leaves out the last message")
    place = rendered.rindex(mark)
    if rendered[place : place + len(_CUT)] == _CUT:
        return rendered[:place]
    return rendered[:place].rstrip()  # the template trims what it writes


# --- Jinja, with what templates may use ---------------------------------------------------------


class _Generation(Extension):
    """The tags around an assistant's text, for training: what is between them is a call's body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may have one of the name `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace takes no name such as {name!r}")


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, which Jinja's own filter writes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)
