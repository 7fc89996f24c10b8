"""Values of a call's arguments as JSON, where a model writes text or Python's literals."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

_TYPES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
_NAMED = {"true": True, "false": False, "null": None}
TEXT = frozenset({"string"})  # the types of a value that is text and nothing else
_DEEPEST = 20  # references followed one behind the other


def json_of(value: Any) -> str:
    """JSON of a value. Raises ValueError for one that JSON hasn't."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def from_text(text: str, schema: Any, root: Any) -> str:
    """JSON of a value written as text: what its schema makes of it, or a string.

    `root`: the schema that references within `schema` are of.
    """
    allowed = types_of(schema, root)
    if allowed == TEXT:
        return json_of(text)
    try:
        value, written = literal(text)
    except ValueError:
        return json_of(text)
    stays = isinstance(value, str) or not _fits(value, allowed)
    return json_of(text) if stays and (allowed is None or "string" in allowed) else written


def from_literal(text: str, schema: Any, root: Any) -> str:
    """JSON of a value written as a literal; of a string where the schema has none, what that stands
    for. What is no literal is a string."""
    try:
        value, written = literal(text)
    except ValueError:
        return json_of(text)
    allowed = types_of(schema, root)
    if isinstance(value, str) and allowed is not None and "string" not in allowed:
        return from_text(value, schema, root)
    return written


def _fits(value: Any, allowed: frozenset[str] | None) -> bool:
    kind = _TYPES[type(value)]
    return allowed is None or kind in allowed or (kind == "integer" and "number" in allowed)


def literal(text: str) -> tuple[Any, str]:
    """The value of JSON or of a Python literal, and its JSON. Raises ValueError."""
    text = text.strip()
    try:
        return json.loads(text, parse_constant=_no_json), text
    except (ValueError, RecursionError):
        pass
    try:
        value = _value(ast.parse(text, mode="eval").body)
        return value, json_of(value)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _no_json(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in _NAMED:
            return _NAMED[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [None if key is None else _value(key) for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value, values), strict=True))
    raise ValueError("is no literal")


def property_of(schema: Any, key: str) -> Any:
    """The schema of a property of arguments; True: any value."""
    schema = resolved(schema, schema)
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key, True) if isinstance(properties, Mapping) else True


def resolved(schema: Any, root: Any) -> Any:
    """The schema behind its references within `root`; True if there is none."""
    for _ in range(_DEEPEST):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        schema = _at(root, reference)
    return True


def _at(root: Any, reference: str) -> Any:
    value = root
    for step in reference.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        value = value.get(key, True) if isinstance(value, Mapping) else True
    return value


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str] | None:
    """JSON types that a schema allows; None if it doesn't say."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return None
    named, values = schema.get("type"), schema.get("enum")
    if isinstance(named, str):
        return frozenset([named])
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    if isinstance(values, list):
        return frozenset(_TYPES[type(value)] for value in values)
    if "const" in schema:
        return frozenset([_TYPES[type(schema["const"])]])
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            found = [types_of(part, root, depth + 1) for part in parts]
            known = [types for types in found if types is not None]
            return frozenset[str]().union(*known) if len(known) == len(found) else None
    parts = schema.get("allOf")
    inner = (types_of(part, root, depth + 1) for part in (parts if isinstance(parts, list) else ()))
    return next((types for types in inner if types is not None), None)
