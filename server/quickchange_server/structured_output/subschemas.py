"""Subschemas of a JSON schema: where they stand, and copies of a schema with some of them changed.

Data beside them is never taken for a schema: the values of enum, const, default and examples, and
the names of properties, may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Path = list[str | int]

DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *DEFINITIONS)  # names to schemas
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties")


def place_of(root: str, path: Path) -> str:
    """A path as clients read it: `schema.properties.age.minimum`, `schema.anyOf[0]`."""
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


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


def replaced(schema: Any, path: Path, part: Any) -> Any:
    """A copy of the schema with another value at a path of objects and lists."""
    if not path:
        return part
    head, *rest = path
    inner = replaced(schema[head], rest, part)
    if isinstance(head, int):
        return [*schema[:head], inner, *schema[head + 1 :]]
    return {**schema, head: inner}


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of the schema with `change` applied to it and to every subschema that is an object."""
    if not isinstance(schema, dict):
        return schema
    changed = change(schema)
    for path, part in parts(changed):
        changed = replaced(changed, path, mapped(part, change))
    return changed


def rebased(schema: Any, base: str) -> Any:
    """A copy of the schema whose references hold where it stands inside another, at the pointer
    `base` (such as `#/$defs/a`)."""

    def moved(node: dict[str, Any]) -> dict[str, Any]:
        target = node.get("$ref")
        if not isinstance(target, str) or not target.startswith("#"):
            return node
        return {**node, "$ref": base + target[1:]}

    return mapped(schema, moved)


def pointed(schema: Any, reference: str) -> Path | None:
    """The path that a reference such as `#/$defs/a~1b` points to; None if nothing stands there."""
    if not reference.startswith("#"):
        return None
    pointer = unquote(reference[1:])
    if pointer and not pointer.startswith("/"):
        return None
    path: Path = []
    node = schema
    for raw in pointer.split("/")[1:]:
        name = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            path.append(name)
            node = node[name]
        elif isinstance(node, list) and name in map(str, range(len(node))):
            path.append(int(name))
            node = node[int(name)]
        else:
            return None
    return path
