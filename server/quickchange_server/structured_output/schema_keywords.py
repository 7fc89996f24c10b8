"""JSON-schema keywords that are enforced; a schema with any other is refused, with its place.

The dialect is 2020-12. Annotations don't affect validity, so they are allowed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from quickchange_server.errors import InvalidRequestError
from quickchange_server.structured_output.errors import ImpossibleSchemaError
from quickchange_server.structured_output.pattern_size import LARGEST, TOO_LARGE, written_out
from quickchange_server.structured_output.satisfiability import pruned
from quickchange_server.structured_output.subschemas import (
    Path,
    mapped,
    parts,
    place_of,
    pointed,
)

MOST_PARTS = 1_000  # subschemas
DEEPEST = 48  # levels
_SMALLEST = 1e-100  # over 0
_LARGEST = 2**53  # the library's numbers are binary fractions of 53 bits
_LARGEST_COMMON = 2**24  # of all multiples, in units of the last decimal: its products have 32 bits
_LARGEST_MULTIPLE = 10_000  # in units of the last decimal; the automaton has one state a remainder

ENFORCED = frozenset(
    {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"}
    | {"properties", "patternProperties", "additionalProperties", "required"}
    | {"minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems"}
    | {"minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
ANNOTATIONS = frozenset(
    {"strict", "title", "description", "default", "example", "examples", "deprecated", "readOnly"}
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
_LARGEST_COUNT = 1_000_000
# Control characters without a short escape, and halves of surrogate pairs
_UNWRITTEN = frozenset(map(chr, (*range(32), 127, *range(0xD800, 0xE000)))) - set("\b\f\n\r\t")
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def check_schema(schema: Any, root: str) -> None:
    """Raise InvalidRequestError, with the place under `root` as its param, at the first keyword
    that is not enforced, if the schema is too large, or if no text satisfies it."""
    check_keywords(schema, root)
    try:
        pruned(schema)
    except ImpossibleSchemaError as error:
        raise _refusal(place_of(root, error.path), str(error)) from error


def check_keywords(schema: Any, root: str) -> None:
    """Raise InvalidRequestError, with the place under `root` as its param, at the first keyword
    that is not enforced, or if the schema is too large."""
    waiting: list[tuple[Path, Any]] = [([], schema)]
    seen = 0
    known: set[tuple[str | int, ...]] = set()
    references: list[tuple[str, str]] = []
    step = (1, 0)  # the common multiple of all multipleOf, and its decimal places
    while waiting:
        path, node = waiting.pop()
        place = place_of(root, path)
        seen += 1
        if seen > MOST_PARTS or len(path) > 2 * DEEPEST:
            raise _refusal(
                root, f"has more than {MOST_PARTS} schemas inside, or more than {DEEPEST} levels; "
                "simplify it",
            )  # fmt: skip
        known.add(tuple(path))
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise _refusal(place, "must be a schema: an object, true or false")
        for key, value in node.items():
            _check_keyword(place_of(place, [key]), key, value)
        if "$ref" in node:
            references.append((place_of(place, ["$ref"]), node["$ref"]))
        if "multipleOf" in node:
            step = _common(step, node["multipleOf"])
            if step[0] > _LARGEST_COMMON:
                raise _refusal(
                    place_of(place, ["multipleOf"]),
                    "has too large a common multiple with those of the rest of the schema; use "
                    "fewer of them",
                )
        waiting += [([*path, *inner], part) for inner, part in parts(node)]
    for place, reference in references:
        target = pointed(schema, reference)
        if target is None or tuple(target) not in known:
            raise _refusal(place, f"no schema stands at {reference!r}")


def enforceable(schema: Any) -> Any:
    """The schema as it is enforced: without annotations, and `false` for what no text satisfies.

    Annotations may hold what the library can't read. Raises ImpossibleSchemaError.
    """
    return pruned(mapped(schema, lambda node: {k: v for k, v in node.items() if not _notes(k)}))


def _notes(key: str) -> bool:
    """True for an annotation."""
    return key in ANNOTATIONS or (key.startswith("x-") and key != "x-guidance")


def _common(step: tuple[int, int], multiple: float) -> tuple[int, int]:
    """The least common multiple of two decimals, each as digits and decimal places."""
    exponent = int(Decimal(str(multiple)).normalize().as_tuple()[2])
    places = max(0, -exponent)
    digits = int(Decimal(str(multiple)).scaleb(places))
    most = max(places, step[1])
    left, right = step[0] * 10 ** (most - step[1]), digits * 10 ** (most - places)
    return (right if step == (1, 0) else math.lcm(left, right)), most


def _refusal(place: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place}: {message}", param=place)


def _check_keyword(place: str, key: str, value: Any) -> None:
    if _notes(key):
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
    return number and (isinstance(value, int) or math.isfinite(value))


def _is_exact(value: float) -> bool:
    """True if the library writes and compares this number as it is."""
    return abs(value) <= _LARGEST and (value == 0 or abs(value) >= _SMALLEST)


_INEXACT = (
    f"has a number beyond ±{_LARGEST} (2^53), or nearer to 0 than {_SMALLEST:g}, which can't be "
    "enforced exactly; use a smaller one, or a string with a pattern"
)


def _wrong_number(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return _INEXACT  # 1e400, as it was written
    if not _is_number(value):
        return "must be a number"
    return None if _is_exact(value) else _INEXACT


def _wrong_multiple(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and value > _LARGEST:
        return _TOO_LONG
    if not _is_number(value) or value <= 0:
        return "must be a number above 0"
    digits, exponent = Decimal(str(value)).normalize().as_tuple()[1:]
    whole = int("".join(map(str, digits))) * 10 ** max(int(exponent), 0)
    if whole > _LARGEST_MULTIPLE or int(exponent) < -4:
        return _TOO_LONG
    return None


_TOO_LONG = f"has too many digits to be enforced; at most {_LARGEST_MULTIPLE}, 4 decimal places"


def _wrong_count(value: Any) -> str | None:
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not sound:
        return "must be an integer of 0 or more"
    return None if value <= _LARGEST_COUNT else f"is more than {_LARGEST_COUNT}; leave it out"


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
    r"""Refuse control characters that need an escape such as \u001f, which is never generated, and
    numbers that would be rounded."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and any(c in _UNWRITTEN for c in one):
            return "has a control character, which is not written here; remove it"
        number = isinstance(one, int | float) and not isinstance(one, bool)
        if number and (wrong := _wrong_number(one)) is not None:
            return wrong
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return None


def _wrong_pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be a string"
    return TOO_LARGE if written_out(value) > LARGEST else None


def _wrong_patterns(value: Any) -> str | None:
    wrong = _wrong_map(value)
    return wrong or next(filter(None, map(_wrong_pattern, value)), None)


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
    "patternProperties": _wrong_patterns,
    "additionalProperties": _wrong_schema,
    "items": _wrong_schema,
    "required": _wrong_names,
    "pattern": _wrong_pattern,
    "format": _wrong_format,
}
