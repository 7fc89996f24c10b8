"""Where in a schema the fault lies that keeps it from compiling, found by compiling its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = list[str | int]
Fails = Callable[[object], str | None]  # why a schema can't be compiled; None: it can

_TRIES = 200  # parts compiled at most
_DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)  # names to schemas
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties")


def parts(schema: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The schemas directly inside one, each with its place."""
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
    """The place of the innermost part that fails alone, down to the keyword without which it would
    not; and why that part fails. `error`: why the whole fails."""
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
        for key in sorted(node, key=lambda key: key == "type"):  # of last resort
            without = {**shared, **{k: v for k, v in node.items() if k != key}}
            if next(tries, None) is not None and fails(without) is None:
                return [*path, key], error
    return path, error
