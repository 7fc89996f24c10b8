"""Grammars of tool calls, for every form that a chat template may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quickchange_server.api.openai.chat.lark_rules import LarkRules, json_rule, lark_marks
from quickchange_server.api.openai.chat.parameter_grammars import UnkeptError, parameters_rule
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.parsing.tool_forms import JsonCall, NamedCall, ToolForm
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.schema_keywords import enforceable
from quickchange_server.structured_output.subschemas import place_of, rebased

Json = dict[str, Any]


def parameters_of(tool: Tool) -> Json:
    """The JSON schema of a function's parameters."""
    return {"type": "object", **(tool.function.parameters or {})}


def call_grammar(text: Text, form: ToolForm, tools: Sequence[Tool]) -> str:
    """A Lark grammar of exactly one call with arguments that fit its function's schema.

    Raises InvalidRequestError if the form has no room for a schema.
    """
    calls = _Calls(text, form, tools, all_kept=True)
    return calls.rules.source(f"{calls.mark} {calls.behind_mark(several=False)}")


def free_grammar(
    text: Text,
    form: ToolForm,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    answer: Json | None = None,
) -> str:
    """A Lark grammar of any text with calls in it, in which what follows the mark of a call is one:
    of these functions, and with arguments that fit the schemas of those that are strict.

    Where calls have no mark, a text that begins as a call is one. `answer`: the text is JSON of
    this schema, or calls. Raises InvalidRequestError if the form has no room for a schema.
    """
    calls = _Calls(text, form, tools, all_kept=False)
    behind = calls.behind_mark(several=parallel)
    again = parallel and bool(form.mark) and form.several and not form.sectioned
    if answer is not None:
        several = "+" if again and not calls.listed else ""
        return calls.rules.source(
            f"answer | call{several}",
            f"answer: {json_rule(answer)}",
            f"call: BLANKS? {calls.mark} {behind}",
        )
    if not form.mark:
        first = "{\\[" if isinstance(form.call, JsonCall) else "\\" + form.head[:1]
        plain = f"PLAIN: /([ \\n\\r\\t]*[^ \\n\\r\\t{first}](?s:.*))?/"
        return calls.rules.source(f"PLAIN | BLANKS? {behind} BLANKS?", plain)
    parts = text.special_parts(form.mark)
    special = next((at for at, part in enumerate(parts) if isinstance(part, int)), None)
    if special is None:
        head = f"head[lazy]: ANY {lark_marks(parts)}"
    else:  # no text can be mistaken for it
        head = f"head: ANY {lark_marks(parts[special:])}"
    return calls.rules.source(
        "call* rest" if parallel else "call | rest",
        f"call: head {behind}",
        "rest: ANY",
        head,
        "ANY: /(?s:.*)/",
    )


class _Calls:
    """Rules of the calls of some functions, in one form."""

    def __init__(
        self, text: Text, form: ToolForm, tools: Sequence[Tool], *, all_kept: bool
    ) -> None:
        """Without `all_kept`, the schemas of functions that are strict are kept alone."""
        self.rules = LarkRules(text)
        self.mark = self.rules.literal(form.mark)
        self._form = form
        self._tools = tools
        self._all_kept = all_kept

    @property
    def listed(self) -> bool:
        return isinstance(self._form.call, JsonCall) and self._form.call.listed

    def behind_mark(self, *, several: bool) -> str:
        """Calls from behind their mark on: more than one only if they stand together."""
        form = self._form
        head = form.head[len(form.mark) :]
        if isinstance(form.call, JsonCall):
            body, literal = self._json(form.call, several=several), self._loose
        else:
            named = [self._named(form.call, tool) for tool in self._tools]
            body, literal = self.rules.add(" | ".join(named)), self.rules.literal
        again = f"{literal(form.close + form.separator + form.open)} {body}"
        more = f"({again})*" if several and form.sectioned and not self.listed else ""
        return f"{literal(head)} {body} {more} {literal(form.close + form.end)}"

    def _loose(self, text: str) -> str:
        """A literal text beside JSON, with blanks or without."""
        inner = self.rules.literal(text.strip())
        return f"BLANKS? {inner} BLANKS?" if inner else "BLANKS?"

    def _named(self, call: NamedCall, tool: Tool) -> str:
        kept = self._all_kept or bool(tool.function.strict)
        schema = enforceable(parameters_of(tool)) if kept else {"type": "object"}
        head = self.rules.literal(tool.function.name + call.middle)
        if call.arguments == "json":
            return f"{head} {json_rule(schema)}"
        form = None if call.arguments == "python" else call.arguments
        if not kept:
            schema = parameters_of(tool)
        try:
            arguments = parameters_rule(self.rules, form, schema, kept=kept)
        except UnkeptError as error:
            raise InvalidRequestError(
                f"the function {tool.function.name!r}: {place_of('parameters', [*error.path])} "
                f"{error}: this model writes arguments one by one, as text; remove it, or leave "
                "the choice to the model without strict",
                param="tools",
            ) from error
        return f"{head} {arguments}" + (' ")"' if form is None else "")

    def _json(self, call: JsonCall, *, several: bool) -> str:
        parameters = {
            tool.function.name: parameters_of(tool)
            if self._all_kept or tool.function.strict
            else {"type": "object"}
            for tool in self._tools
        }
        return json_rule(_calls_schema(call, parameters, most=None if several else 1))


def _calls_schema(call: JsonCall, parameters: Mapping[str, Json], most: int | None) -> Json:
    """The JSON schema of calls of functions with these parameters, each a definition of it."""
    definitions = {
        str(number): rebased(enforceable(schema), f"#/$defs/{number}")
        for number, schema in enumerate(parameters.values())
    }
    calls: Json = {
        "anyOf": [
            _nested(
                [
                    (call.name_path, {"const": name}),
                    (call.arguments_path, {"$ref": f"#/$defs/{number}"}),
                ]
            )
            for number, name in enumerate(parameters)
        ]
    }
    if call.listed:
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
