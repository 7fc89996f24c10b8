"""Location of the fault that keeps a schema from compiling, found by compiling it without parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from quickchange_server.structured_output.subschemas import DEFINITIONS, Path, parts, replaced

Fails = Callable[[object], str | None]  # the error of compiling a schema; None: it compiles

_TRIES = 200  # compilations at most
_LAST = (*DEFINITIONS, "type", "additionalProperties")  # seldom to blame themselves


def find_fault(schema: Any, error: str, fails: Fails) -> tuple[Path, str]:
    """The path to the innermost subschema without which the whole compiles, and the error.

    The path ends with a keyword if it is to blame itself. Of several faults the first is found that
    fails alone too. `error`: the error of the whole schema.
    """
    tries = iter(range(_TRIES))

    def mends(path: Path, part: object) -> bool:
        return next(tries, None) is not None and fails(replaced(schema, path, part)) is None

    path: Path = []
    node: Any = schema
    while isinstance(node, dict):
        # A branch of anyOf that allows anything would hide the faults of the others.
        several = len(node.get("anyOf", ())) > 1
        inner = next(
            (
                place
                for place, _ in _objects(node)
                if mends([*path, *place], False if several and place[0] == "anyOf" else {})
            ),
            None,
        )
        if inner is None:
            break
        path += inner
        node = _at(schema, path)
    if isinstance(node, dict):
        for key in sorted(node, key=lambda key: key in _LAST):
            if mends(path, {k: v for k, v in node.items() if k != key}):
                return [*path, key], error
    if not path:  # several faults at once: one of the parts that fail alone
        shared = {key: schema[key] for key in DEFINITIONS if key in schema}
        for place, part in _objects(schema):
            found = fails({**shared, **part}) if next(tries, None) is not None else None
            if found is not None:
                inner, told = find_fault({**shared, **part}, found, fails)
                shown = inner if inner[:1] and inner[0] in shared else [*place, *inner]
                return shown, told
    return path, error


def _objects(schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The subschemas that are no mere true or false."""
    return ((path, part) for path, part in parts(schema) if isinstance(part, dict) and part)


def _at(schema: Any, path: Path) -> Any:
    for key in path:
        schema = schema[key]
    return schema
