"""JSON-schema keywords that are enforced; a schema with any other is refused, with its place.

The dialect is 2020-12. Annotations don't affect validity, so they are allowed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from quickchange_server.errors import InvalidRequestError
from quickchange_server.structured_output.fault_location import Path, parts

MOST_PARTS = 1_000  # subschemas
DEEPEST = 48  # levels
_LARGEST_MULTIPLE = 10_000  # in units of the last decimal; the automaton has one state a remainder

ENFORCED = frozenset(
    {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"}
    | {"properties", "patternProperties", "additionalProperties", "required"}
    | {"minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems"}
    | {"minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly"}
    | {"writeOnly", "$comment", "$schema", "discriminator"}
)
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
REFUSED = {
    "uniqueItems": "remove it, and check the answer yourself",
    "not": "say what is allowed instead: enum, pattern or anyOf",
    "if": "use anyOf with a const in each branch",
    "then": "use anyOf with a const in each branch",
    "else": "use anyOf with a const in each branch",
    "additionalItems": "use prefixItems and items, as JSON Schema 2020-12 has them",
    "nullable": 'use a type such as ["string", "null"]',
    "dependentRequired": "use anyOf",
    "dependencies": "use anyOf",
}
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COUNTS = frozenset(
    {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
)
_WRITTEN = frozenset("\b\f\n\r\t")  # control characters with a short escape
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def place_of(root: str, path: Path) -> str:
    """A path as clients read it: `schema.properties.age.minimum`, `schema.anyOf[0]`."""
    return root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def check_keywords(schema: Any, root: str) -> None:
    """Raise InvalidRequestError, with the place under `root` as its param, at the first keyword
    that is not enforced, or if the schema is too large."""
    waiting: list[tuple[Path, Any]] = [([], schema)]
    seen = 0
    while waiting:
        path, node = waiting.pop()
        place = place_of(root, path)
        seen += 1
        if seen > MOST_PARTS or len(path) > 2 * DEEPEST:
            raise _refusal(
                root, f"has more than {MOST_PARTS} schemas inside, or more than {DEEPEST} levels; "
                "simplify it",
            )  # fmt: skip
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise _refusal(place, "must be a schema: an object, true or false")
        for key, value in node.items():
            _check_keyword(place_of(place, [key]), key, value)
        waiting += [([*path, *inner], part) for inner, part in parts(node)]


def _refusal(place: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place}: {message}", param=place)


def _check_keyword(place: str, key: str, value: Any) -> None:
    if key in ANNOTATIONS or (key.startswith("x-") and key != "x-guidance"):
        return
    if key not in ENFORCED:
        remedy = REFUSED.get(key, "remove it (docs/structured.md lists those that are)")
        raise _refusal(place, f"the keyword {key!r} is not enforced here; {remedy}")
    wrong = _shape(key)(value)
    if wrong is not None:
        raise _refusal(place, wrong)


def _shape(key: str) -> Callable[[Any], str | None]:
    """The check of a keyword's value, which returns an error or None."""
    if key in _NUMBERS:
        return _wrong_multiple if key == "multipleOf" else _wrong_number
    if key in _COUNTS:
        return _wrong_least if key == "minProperties" else _wrong_count
    return _SHAPES[key]


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _wrong_number(value: Any) -> str | None:
    return None if _is_number(value) else "must be a number"


def _wrong_multiple(value: Any) -> str | None:
    if not _is_number(value) or value <= 0:
        return "must be a number above 0"
    digits, exponent = Decimal(str(value)).normalize().as_tuple()[1:]
    whole = int("".join(map(str, digits))) * 10 ** max(int(exponent), 0)
    if whole > _LARGEST_MULTIPLE or int(exponent) < -4:
        return f"has too many digits to be enforced; at most {_LARGEST_MULTIPLE}, 4 decimal places"
    return None


def _wrong_count(value: Any) -> str | None:
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if sound else "must be an integer of 0 or more"


def _wrong_least(value: Any) -> str | None:
    # A text may repeat a key, which then counts once when it is parsed.
    if _wrong_count(value) is None and value > 1:
        return "is enforced up to 1; list the keys under properties and required"
    return _wrong_count(value)


def _wrong_type(value: Any) -> str | None:
    several = value if isinstance(value, list) and value else [value]
    sound = all(isinstance(one, str) and one in _TYPES for one in several)
    return None if sound else f"must be one or a list of {', '.join(sorted(_TYPES))}"


def _wrong_schemas(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "must be a list of schemas"


def _wrong_map(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object of schemas"
    return _wrong_value(list(value))


def _wrong_schema(value: Any) -> str | None:
    if isinstance(value, list):
        return "must be a schema; for tuples use prefixItems"
    return None if isinstance(value, dict | bool) else "must be a schema"


def _wrong_names(value: Any) -> str | None:
    sound = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return _wrong_value(value) if sound else "must be a list of property names"


def _wrong_enum(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list of at least one value"
    return _wrong_value(value)


def _wrong_value(value: Any) -> str | None:
    r"""Refuse control characters that need an escape such as \u001f, which is never generated."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and any(c < " " and c not in _WRITTEN for c in one):
            return "has a control character, which is not written here; remove it"
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return None


def _wrong_text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be a string"


def _wrong_reference(value: Any) -> str | None:
    sound = isinstance(value, str) and value.startswith("#")
    return None if sound else "must point inside the schema, such as #/$defs/name"


def _wrong_format(value: Any) -> str | None:
    if isinstance(value, str) and value in FORMATS:
        return None
    return f"is not enforced here; use one of {', '.join(sorted(FORMATS))}, or pattern"


_SHAPES: dict[str, Callable[[Any], str | None]] = {
    "type": _wrong_type,
    "enum": _wrong_enum,
    "const": _wrong_value,
    "anyOf": _wrong_schemas,
    "oneOf": _wrong_schemas,
    "allOf": _wrong_schemas,
    "prefixItems": _wrong_schemas,
    "$ref": _wrong_reference,
    "$defs": _wrong_map,
    "definitions": _wrong_map,
    "properties": _wrong_map,
    "patternProperties": _wrong_map,
    "additionalProperties": _wrong_schema,
    "items": _wrong_schema,
    "required": _wrong_names,
    "pattern": _wrong_text,
    "format": _wrong_format,
}
