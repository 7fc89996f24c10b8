"""Tools of a chat: whether the model can call them, the grammar of a call, the parser of calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quickchange_server.api.openai.chat.chat_requests import ChatRequest, Message
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.text_constraints import asked
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.parsing.tool_parser import ToolFormat, ToolReader
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import JSON_FORM
from quickchange_server.structured_output.schema_keywords import check_schema, enforceable
from quickchange_server.structured_output.subschemas import rebased
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
    """The constraint of an answer that must be a call, or may be one: then its calls must fit
    their schemas, and the rest what else the body asks for. None if the tools demand nothing."""
    other = asked(body)
    tools = body.demanded_tools or [tool for tool in body.offered_tools if tool.function.strict]
    if body.demanded_tools and other is not None:
        raise InvalidRequestError(
            f"tool_choice: makes the answer a call, and {other.place} makes it something else; "
            "give one",
            param="tool_choice",
        )
    answer = None if other is None else _json_of(other.constraint)
    if not tools and answer is None:
        return None
    if other is not None and answer is None:  # its text can't hold a call
        return None
    for index, tool in enumerate(body.tools):
        if tool in tools:
            check_schema(_parameters(tool), f"tools[{index}].function.parameters")
    if body.demanded_tools:
        grammar = call_grammar(text, form, tools)
    else:
        grammar = free_grammar(
            text, form, body.offered_tools, parallel=body.parallel_tool_calls, answer=answer
        )
    return Asked(Constraint("grammar", grammar), "tools" if other is None else other.place)


def _json_of(constraint: Constraint) -> Json | None:
    """The JSON schema of a constraint's text; None if it is another text."""
    if constraint.kind == "json_object":
        return {"type": "object"}
    if constraint.kind != "json_schema":
        return None
    schema = enforceable(json.loads(constraint.source))
    return {} if schema is True else schema


BLANKS = "BLANKS: /[ \\n]{1,2}/\n"


def call_grammar(text: Text, form: ToolFormat, tools: Sequence[Tool]) -> str:
    """A Lark grammar of exactly one call with arguments that fit its function's schema."""
    schema = _calls_schema(form, {tool.function.name: _parameters(tool) for tool in tools}, most=1)
    begin = f"{lark_mark(text, form.begin)} BLANKS? " if form.begin else ""
    return f"start: {begin}{_written(text, form, schema)}\n{BLANKS}"


def free_grammar(
    text: Text,
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    answer: Json | None = None,
) -> str:
    """A Lark grammar of any text with calls in it, in which what follows the mark of a call is one:
    of these functions, and with arguments that fit the schemas of those that are strict.

    Where calls have no mark, a text that begins as JSON is one. `answer`: the text is JSON of this
    schema, or calls.
    """
    schemas = {
        tool.function.name: _parameters(tool) if tool.function.strict else {"type": "object"}
        for tool in tools
    }
    schema = _calls_schema(form, schemas, most=None if parallel else 1)
    written = _written(text, form, schema)
    if answer is not None:
        mark = f"{lark_mark(text, form.begin)} BLANKS? " if form.begin else ""
        several = "+" if parallel and form.begin and not form.listed else ""
        return (
            f"start: answer | call{several}\nanswer: {_json(answer)}\n"
            f"call: BLANKS? {mark}{written}\n{BLANKS}"
        )
    if not form.begin:
        plain = "PLAIN: /([ \\n\\r\\t]*[^ \\n\\r\\t{\\[](?s:.*))?/\n"
        return f"start: PLAIN | BLANKS? {written} BLANKS?\n{plain}{BLANKS}"
    parts = text.special_parts(form.begin)
    special = next((at for at, part in enumerate(parts) if isinstance(part, int)), None)
    if special is None:
        head = f"head[lazy]: ANY {lark_marks(parts)}\n"
    else:  # no text can be mistaken for it
        head = f"head: ANY {lark_marks(parts[special:])}\n"
    start = "call* rest" if parallel else "call | rest"
    return (
        f"start: {start}\ncall: head BLANKS? {written}\nrest: ANY\n{head}ANY: /(?s:.*)/\n{BLANKS}"
    )


def _written(text: Text, form: ToolFormat, schema: Json) -> str:
    """A call behind its mark, in Lark's syntax."""
    return _json(schema) + (f" BLANKS? {lark_mark(text, form.end)}" if form.end else "")


def _json(schema: Json) -> str:
    """JSON of a schema, in Lark's syntax."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_FORM})}"


def _parameters(tool: Tool) -> Json:
    return {"type": "object", **(tool.function.parameters or {})}


def _calls_schema(form: ToolFormat, parameters: Mapping[str, Json], most: int | None) -> Json:
    """The JSON schema of calls of functions with these parameters, each a definition of it."""
    definitions = {
        str(number): rebased(enforceable(schema), f"#/$defs/{number}")
        for number, schema in enumerate(parameters.values())
    }
    calls: Json = {
        "anyOf": [
            _nested(
                [
                    (form.name_path, {"const": name}),
                    (form.arguments_path, {"$ref": f"#/$defs/{number}"}),
                ]
            )
            for number, name in enumerate(parameters)
        ]
    }
    if form.listed:
        calls = {"type": "array", "items": calls, "minItems": 1}
        if most is not None:
            calls["maxItems"] = most
    return {**calls, "$defs": definitions}


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


def lark_mark(text: Text, mark: str) -> str:
    """A mark in Lark's syntax."""
    return lark_marks(text.special_parts(mark))


def lark_marks(parts: Sequence[str | int]) -> str:
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
        for part in parts
    )
