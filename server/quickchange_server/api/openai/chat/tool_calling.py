"""Tools of a chat: whether the model can call them, the grammar of a call, the parser of calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quickchange_server.api.openai.chat.chat_requests import ChatRequest, Message
from quickchange_server.api.openai.chat.tool_grammars import (
    call_grammar,
    free_grammar,
    parameters_of,
)
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.text_constraints import asked
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.parsing.tool_forms import ToolForm
from quickchange_server.frontend.parsing.tool_parser import ToolReader
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.schema_keywords import check_schema, enforceable
from quickchange_server.structured_output.validator import Asked

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Calls:
    """The form of a chat's tool calls and the functions they may name."""

    form: ToolForm
    parameters: Mapping[str, Json]  # their schemas, by the functions' names

    def reader(self) -> ToolReader:
        return ToolReader(self.form, self.parameters)


def with_tools(text: Text, order: Order[ChatRequest]) -> tuple[Order[ChatRequest], Calls | None]:
    """The order with its tools' constraint on the text, and the form of calls; None: no tools.

    Raises InvalidRequestError if the model takes no tools, or the answer can't be a call.
    """
    body = order.body
    form = tools_form(text, body.messages, body.offered_tools)
    if form is None:
        return order, None
    calls = Calls(form, {tool.function.name: parameters_of(tool) for tool in body.offered_tools})
    shown = order.shown | text.special_of(form.marks)  # calls are recognised by them
    demanded = _demanded(text, form, body)
    return replace(order, demanded=demanded, shown=shown), calls


def tools_form(text: Text, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolForm | None:
    """The form in which the model calls one of `tools`; None: there are none.

    Raises InvalidRequestError if its chat template takes no tools, or no messages about them.
    """
    if any(message.about_tools for message in messages):
        _form(text, "messages")
    return _form(text, "tools") if tools else None


def _form(text: Text, param: str) -> ToolForm:
    form = text.tool_form
    if form is None:
        raise InvalidRequestError(
            f"{param}: this model's chat template takes no tools, or writes calls in a form that "
            "can't be read back; describe the tools in the prompt, and ask for a format with "
            "response_format",
            param=param,
        )
    return form


def _demanded(text: Text, form: ToolForm, body: ChatRequest) -> Asked | None:
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
            check_schema(parameters_of(tool), f"tools[{index}].function.parameters")
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
