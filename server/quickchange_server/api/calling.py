"""What tools make of a chat: whether the model can call them, and how its calls are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from quickchange_server.api.schemas import ChatRequest
from quickchange_server.api.tool_schemas import Tool
from quickchange_server.errors import InvalidRequestError
from quickchange_server.text import Text
from quickchange_server.tools import ToolFormat, ToolReader

_BLANKS = r"[ \n]{0,2}"


@dataclass(frozen=True, slots=True)
class Calling:
    """A chat with tools: the body that is generated from, and the form of its calls."""

    body: ChatRequest
    form: ToolFormat

    def reader(self) -> ToolReader:
        return ToolReader(self.form, {tool.function.name for tool in self.body.offered_tools})


def of(text: Text, body: ChatRequest) -> Calling | None:
    """None where the chat has no tools. Raises InvalidRequestError where the model takes none."""
    if any(message.about_tools for message in body.messages):
        _form(text, "messages")
    if not body.offered_tools:
        return None
    form = _form(text, "tools")
    changes: dict[str, object] = {}
    if text.is_special(form.begin) or text.is_special(form.end):
        changes["skip_special_tokens"] = False  # they are what calls are recognised by
    if body.demanded_tools:
        if body.constrains_text:
            raise InvalidRequestError(
                "tool_choice: makes the answer a call, which another field constrains otherwise; "
                "leave one of them out",
                param="tool_choice",
            )
        changes["guided_grammar"] = call_grammar(text, form, body.demanded_tools)
    return Calling(body.model_copy(update=changes), form)


def _form(text: Text, param: str) -> ToolFormat:
    form = text.tool_format
    if form is None:
        raise InvalidRequestError(
            f"{param}: this model's chat template takes no tools, or writes calls in a form that "
            "can't be read back; describe the tools in the prompt, and ask for a format with "
            "response_format",
            param=param,
        )
    return form


def call_grammar(text: Text, form: ToolFormat, tools: Sequence[Tool]) -> str:
    """A Lark grammar of exactly one call, with arguments that fit its function's schema."""
    schemas = [
        form.written(
            {"const": tool.function.name}, tool.for_template()["function"]["parameters"]
        )
        for tool in tools
    ]
    calls = {"anyOf": [_object(schema, form) for schema in schemas]}
    value = {"type": "array", "items": calls, "minItems": 1, "maxItems": 1}
    schema = json.dumps(value if form.listed else calls)
    begin, end = (_mark(text, mark) for mark in (form.begin, form.end))
    return f"start: {begin} %json {schema} {end}\n"


def _object(value: object, form: ToolFormat) -> object:
    """`ToolFormat.written`'s nested places as JSON schemas of objects with exactly these keys."""
    raise NotImplementedError


def _mark(text: Text, mark: str) -> str:
    """A mark and the blanks around it, as Lark writes it."""
    if not mark:
        return ""
    written = f"<{mark.strip('<>')}>" if text.is_special(mark) else json.dumps(mark)
    return f"/{_BLANKS}/ {written} /{_BLANKS}/"
