"""Location of the fault that keeps a schema from compiling, found by compiling its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = list[str | int]
Fails = Callable[[object], str | None]  # the error of compiling a schema; None: it compiles

_TRIES = 200  # compilations at most
_DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)  # names to schemas
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties")


def parts(schema: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The direct subschemas of a schema, each with its path."""
    for key in _MAPS:
        inside = schema.get(key)
        if isinstance(inside, dict):
            for name, part in inside.items():
                yield [key, name], part
    for key in _LISTS:
        inside = schema.get(key)
        if isinstance(inside, list):
            for index, part in enumerate(inside):
                yield [key, index], part
    for key in _SINGLE:
        if key in schema:
            yield [key], schema[key]


def find_fault(schema: Any, error: str, fails: Fails) -> tuple[Path, str]:
    """The path to the innermost subschema that fails by itself, and its error.

    The path ends with a keyword if the subschema compiles without it. `error`: the error of the
    whole schema.
    """
    if not isinstance(schema, dict):
        return [], error
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    tries = iter(range(_TRIES))
    path: Path = []
    node: Any = schema
    while isinstance(node, dict):
        for place, part in parts(node):
            whole = {**shared, **part} if isinstance(part, dict) else part
            found = fails(whole) if next(tries, None) is not None else None
            if found is not None:
                path, node, error = [*path, *place], part, found
                break
        else:
            break
    if isinstance(node, dict):
        for key in sorted(node, key=lambda key: key == "type"):  # "type" is tried last
            without = {**shared, **{k: v for k, v in node.items() if k != key}}
            if next(tries, None) is not None and fails(without) is None:
                return [*path, key], error
    return path, error
