"""Tools of a chat: whether the model can call them, the grammar of a call, the parser of calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.requests import ChatRequest, Message
from quickchange_server.api.openai.text_constraints import asked
from quickchange_server.api.openai.tool_requests import Tool
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.frontend.tool_parser import ToolFormat, ToolReader
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import JSON_FORM
from quickchange_server.structured_output.schema_keywords import check_keywords
from quickchange_server.structured_output.validator import Asked

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Calls:
    """The form of a chat's tool calls and the functions they may name."""

    form: ToolFormat
    names: frozenset[str]

    def reader(self) -> ToolReader:
        return ToolReader(self.form, self.names)


def with_tools(text: Text, order: Order[ChatRequest]) -> tuple[Order[ChatRequest], Calls | None]:
    """The order with its tools' constraint on the text, and the form of calls; None: no tools.

    Raises InvalidRequestError if the model takes no tools, or the answer can't be a call.
    """
    body = order.body
    form = tools_form(text, body.messages, body.offered_tools)
    if form is None:
        return order, None
    calls = Calls(form, frozenset(tool.function.name for tool in body.offered_tools))
    marks = text.special_parts(form.begin) + text.special_parts(form.end)
    if any(isinstance(part, int) for part in marks):  # calls are recognised by special tokens
        order = replace(order, body=body.model_copy(update={"skip_special_tokens": False}))
    return replace(order, demanded=_demanded(text, form, body)), calls


def tools_form(text: Text, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolFormat | None:
    """The form in which the model calls one of `tools`; None: there are none.

    Raises InvalidRequestError if its chat template takes no tools, or no messages about them.
    """
    if any(message.about_tools for message in messages):
        _form(text, "messages")
    return _form(text, "tools") if tools else None


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


def _demanded(text: Text, form: ToolFormat, body: ChatRequest) -> Asked | None:
    """The constraint of an answer that must be a call; None if it need not be."""
    if not body.demanded_tools:
        return None
    other = asked(body)
    if other is not None:
        raise InvalidRequestError(
            f"tool_choice: makes the answer a call, and {other.place} makes it something else; "
            "give one",
            param="tool_choice",
        )
    for index, tool in enumerate(body.tools):
        if tool in body.demanded_tools:
            check_keywords(_parameters(tool), f"tools[{index}].function.parameters")
    return Asked(Constraint("grammar", call_grammar(text, form, body.demanded_tools)), "tools")


def call_grammar(text: Text, form: ToolFormat, tools: Sequence[Tool]) -> str:
    """A Lark grammar of exactly one call with arguments that fit its function's schema."""
    calls: Json = {"anyOf": [_call_schema(form, tool) for tool in tools]}
    if form.listed:
        calls = {"type": "array", "items": calls, "minItems": 1, "maxItems": 1}
    schema = json.dumps({**calls, "x-guidance": JSON_FORM})
    begin, end = _mark(text, form.begin), _mark(text, form.end)
    begin = f"{begin} BLANKS? " if begin else ""
    end = f" BLANKS? {end}" if end else ""
    return f"start: {begin}%json {schema}{end}\nBLANKS: /[ \\n]{{1,2}}/\n"


def _parameters(tool: Tool) -> Json:
    return {"type": "object", **(tool.function.parameters or {})}


def _call_schema(form: ToolFormat, tool: Tool) -> Json:
    """The JSON schema of a call of this function."""
    leaves = [
        (form.name_path, {"const": tool.function.name}),
        (form.arguments_path, _parameters(tool)),
    ]
    return _nested(leaves)


def _nested(leaves: Sequence[tuple[Sequence[str], Json]]) -> Json:
    """The schema of nested objects with exactly these paths, each ending in its schema."""
    properties: Json = {}
    for key in dict.fromkeys(path[0] for path, _ in leaves):
        inner = [(path[1:], schema) for path, schema in leaves if path[0] == key]
        ended = [schema for path, schema in inner if not path]
        properties[key] = ended[0] if ended else _nested(inner)
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _mark(text: Text, mark: str) -> str:
    """A mark in Lark's syntax."""
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
        for part in text.special_parts(mark)
    )
