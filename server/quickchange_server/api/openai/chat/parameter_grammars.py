"""Grammars of arguments that are written one by one, each as text or JSON, by their schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quickchange_server.api.openai.chat.lark_rules import LarkRules, json_rule, pattern
from quickchange_server.frontend.parsing.argument_values import TEXT, resolved, types_of
from quickchange_server.frontend.parsing.tool_forms import KEY, ParameterMarks

Json = dict[str, Any]

_DEFINITIONS = ("$defs", "definitions")
_ROOT_KEYS = {"type", "properties", "required", "additionalProperties", "$ref", *_DEFINITIONS}
_TEXT_KEYS = frozenset({"type", "enum", "const", "minLength", "maxLength", "pattern"})
_MIXED_KEYS = frozenset({"type"})
_WRITABLE = re.compile(r"[\w-]+")
_KEYWORDS = ParameterMarks("", (("=", "json"),), "", ", ")  # Python's
_ANY_KEY = "/[a-zA-Z_][a-zA-Z0-9_]*/"


class UnkeptError(Exception):
    """A schema that can't be kept in a form of calls, at a path of keys within it."""

    def __init__(self, path: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.path = path


def parameters_rule(
    rules: LarkRules, form: ParameterMarks | None, schema: Any, *, kept: bool
) -> str:
    """The rule of parameters of a schema; form None: Python's keyword arguments.

    Unless the schema is `kept`, any parameters are lawful. Raises UnkeptError.
    """
    return _ParametersRule(rules, form, schema).of(kept=kept)


class _ParametersRule:
    def __init__(self, rules: LarkRules, form: ParameterMarks | None, root: Any) -> None:
        self._rules = rules
        self._python = form is None
        self._form = form or _KEYWORDS
        self._root = root

    def of(self, *, kept: bool) -> str:
        schema = resolved(self._root, self._root)
        schema = schema if isinstance(schema, dict) else {}
        if kept and (unknown := schema.keys() - _ROOT_KEYS):
            raise UnkeptError([min(unknown)], "is not enforced for all parameters together")
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        if not kept or (not properties and schema.get("additionalProperties") is not False):
            if KEY not in self._form.close:
                return self._any()
            properties = dict.fromkeys(properties, True) if not kept else properties
        required = schema.get("required", ()) if kept else ()
        items = [
            (self._item(key, part), key in required)
            for key, part in properties.items()
            if part is not False
        ]
        return self._row(items)

    def _any(self) -> str:
        """Any parameters at all."""
        form, rules = self._form, self._rules
        value = json_rule({}) if self._python else self._text_value("(?s:.*)", close=form.close)
        middle = rules.literal(form.middles[0][0])
        item = rules.add(f"{rules.literal(form.open)} {_ANY_KEY} {middle} {value}")
        separator = rules.literal(form.separator)
        return rules.add(f"({item} ({separator} {item})*)?")

    def _row(self, items: Sequence[tuple[str, bool]]) -> str:
        """Items in their order, those that are not required or not, with separators between."""
        separator = self._rules.literal(self._form.separator)
        if not separator:
            return self._rules.add(" ".join(f"{i}{'' if needed else '?'}" for i, needed in items))
        first, later = '""', '""'  # the rest of the row, with nothing before it and with something
        for item, needed in reversed(items):
            with_it = f"{item} {later}"
            behind = f"{separator} {item} {later}"
            first = self._rules.add(with_it if needed else f"{with_it} | {first}")
            later = self._rules.add(behind if needed else f"({behind}) | {later}")
        return first

    def _item(self, key: str, schema: Any) -> str:
        if not _WRITABLE.fullmatch(key):
            raise UnkeptError(["properties", key], "has a name that can't be written; rename it")
        form, rules = self._form, self._rules
        close = form.close.replace(KEY, key)
        path = ["properties", key]
        found: list[str] = []
        allowed = types_of(schema, self._root)
        for middle, kind in form.middles[:2]:
            before = rules.literal(form.open + key + middle)
            if kind == "text" and (allowed is None or "string" in allowed):
                found.append(f"{before} {self._text(self._narrowed(schema, True), close, path)}")
            elif kind == "json" and (self._python or allowed != TEXT):
                value = schema if self._python else self._narrowed(schema, False)
                found.append(f"{before} {self._json(value)} {rules.literal(close)}")
            elif kind == "either":
                if allowed is not None and "string" not in allowed:
                    found.append(f"{before} {self._json(schema)} {rules.literal(close)}")
                elif allowed == TEXT:
                    found.append(f"{before} {self._text(schema, close, path)}")
                else:
                    found.append(f"{before} {self._mixed(schema, close, path)}")
        return rules.add(" | ".join(found))

    def _narrowed(self, schema: Any, text: bool) -> Any:
        """The schema of a value's kinds that are text alone, or of those that are not."""
        allowed = types_of(schema, self._root)
        if allowed is not None and (allowed == TEXT) is text and len(allowed) == 1:
            return schema
        if allowed is not None and not text and "string" not in allowed:
            return schema
        others = ["object", "array", "number", "boolean", "null"]
        kinds = ["string"] if text else [kind for kind in others if not allowed or kind in allowed]
        if not text and allowed and "integer" in allowed and "number" not in allowed:
            kinds.append("integer")
        schema = resolved(schema, self._root)
        rest = schema if isinstance(schema, Mapping) else {}
        return {**rest, "type": kinds[0] if len(kinds) == 1 else kinds}

    def _json(self, schema: Any) -> str:
        root = self._root if isinstance(self._root, Mapping) else {}
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        return json_rule({**(schema if isinstance(schema, Mapping) else {}), **definitions})

    def _text(self, schema: Any, close: str, path: list[str]) -> str:
        """A value that is text, with what closes it."""
        schema = resolved(schema, self._root)
        schema = schema if isinstance(schema, Mapping) else {}
        parts = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(parts, list) and schema.keys() <= {"anyOf", "oneOf", "type"}:
            return "(" + " | ".join(self._text(part, close, path) for part in parts) + ")"
        if unknown := schema.keys() - _TEXT_KEYS:
            raise UnkeptError([*path, min(unknown)], "is not enforced for text")
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            texts = [v for v in values if isinstance(v, str) and close.strip() not in v]
            return "(" + " | ".join(self._rules.literal(v + close) for v in texts) + ")"
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        bodies = [f"(?s:.{{{least},{most}}})" if least or most != "" else "(?s:.*)"]
        if "pattern" in schema:
            bodies.append(_anywhere(schema["pattern"], [*path, "pattern"]))
        return self._text_value(*bodies, close=close)

    def _mixed(self, schema: Any, close: str, path: list[str]) -> str:
        """A value that is text or JSON, as it reads: any, if the schema tells types alone."""
        schema = resolved(schema, self._root)
        known = schema if isinstance(schema, Mapping) else {}
        if unknown := known.keys() - _MIXED_KEYS:
            raise UnkeptError([*path, min(unknown)], "is not enforced for what may be text or not")
        return self._text_value("(?s:.*)", close=close)

    def _text_value(self, *bodies: str, close: str) -> str:
        """Text that fits all of these expressions and doesn't contain what closes it, and that."""
        ended = re.escape(close.strip()).replace("\\ ", " ")
        lawful = " & ".join([*map(pattern, bodies), f"~{pattern(f'(?s:.*){ended}(?s:.*)')}"])
        if self._rules.begins_special(close.strip()):
            return f"{self._rules.add(lawful, terminal=True)} {self._rules.literal(close.strip())}"
        # One terminal: where it ends is certain, while two would have to be told apart.
        return self._rules.add(f"({lawful}) {self._rules.literal(close)}", terminal=True)


def _anywhere(regex: str, path: list[str]) -> str:
    """An expression of texts in which the other is found, as JSON Schema has it."""
    depth = 0
    for character in re.sub(r"\\.|\[[^\]]*\]", "", regex):
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            raise UnkeptError(path, "has alternatives outside of brackets; put it into brackets")
    before = "" if regex.startswith("^") else "(?s:.*)"
    after = "" if regex.endswith("$") and not regex.endswith("\\$") else "(?s:.*)"
    body = regex.removeprefix("^")
    return f"{before}({body.removesuffix('$') if not after else body}){after}"
