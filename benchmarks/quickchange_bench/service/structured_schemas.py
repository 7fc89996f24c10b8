"""Ten schemas as clients write them, each with a request that asks for such an object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SchemaCase:
    """A schema by name, and a user's message that asks for it."""

    name: str
    prompt: str
    schema: Schema


def _object(properties: Schema, **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


_MAIL = "^[a-z]{2,8}@[a-z]{2,8}\\.com$"
_LINE = _object(
    {
        "item": {"type": "string", "minLength": 1, "maxLength": 24},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 100},
    }
)

CASES: tuple[SchemaCase, ...] = (
    SchemaCase(
        "order",
        "Turn into JSON: please send 3 boxes of green tea and 1 kettle to Ada Byron in Bergen.",
        _object(
            {
                "customer": {"type": "string", "maxLength": 24},
                "city": {"type": "string", "maxLength": 20},
                "lines": {"type": "array", "items": _LINE, "minItems": 1, "maxItems": 3},
            }
        ),
    ),
    SchemaCase(
        "enums",
        "Classify this ticket: the app crashes whenever I upload a photo.",
        _object(
            {
                "kind": {"enum": ["bug", "question", "feature request", "billing"]},
                "urgent": {"type": "boolean"},
                "severity": {"type": "integer", "minimum": 1, "maximum": 5},
            }
        ),
    ),
    SchemaCase(
        "numbers",
        "How warm, how humid and how windy is a summer day in Rome?",
        _object(
            {
                "celsius": {"type": "number", "minimum": -40, "maximum": 50},
                "humidity": {"type": "integer", "minimum": 0, "maximum": 100},
                "wind": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 60},
            }
        ),
    ),
    SchemaCase(
        "pattern",
        "Make up a flight.",
        _object(
            {
                "flight": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3,4}$"},
                "gate": {"type": "string", "pattern": "^[A-F][1-9][0-9]?$"},
                "from": {"type": "string", "pattern": "^[A-Z]{3}$"},
            }
        ),
    ),
    SchemaCase(
        "formats",
        "Make up a meeting with its date, its start and the host's mail address.",
        _object(
            {
                "day": {"type": "string", "format": "date"},
                "start": {"type": "string", "format": "date-time"},
                "id": {"type": "string", "format": "uuid"},
            }
        ),
    ),
    SchemaCase(
        "any_of",
        "A customer can be reached by mail or by telephone. Make one up.",
        _object(
            {
                "name": {"type": "string", "maxLength": 20},
                "contact": {
                    "anyOf": [
                        _object(
                            {"mail": {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,8}\\.com$"}}
                        ),
                        _object({"phone": {"type": "string", "pattern": "^\\+[0-9]{6,12}$"}}),
                        {"type": "null"},
                    ]
                },
            }
        ),
    ),
    SchemaCase(
        "references",
        "Describe a small folder tree.",
        {
            "$defs": {
                "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                "leaf": _object({"name": {"$ref": "#/$defs/name"}}),
                "node": _object(
                    {
                        "name": {"$ref": "#/$defs/name"},
                        "children": {
                            "type": "array",
                            "items": {"$ref": "#/$defs/leaf"},
                            "maxItems": 2,
                        },
                    }
                ),
            },
            "$ref": "#/$defs/node",
        },
    ),
    SchemaCase(
        "map",
        "How many of each fruit are in the basket: 3 apples, 2 pears?",
        {
            "type": "object",
            "patternProperties": {"^[a-z]{2,10}$": {"enum": [0, 1, 2, 3, 4, 5]}},
            "additionalProperties": False,
            "maxProperties": 4,
        },
    ),
    SchemaCase(
        "tuple",
        "Name two points on a map.",
        {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "array",
                "prefixItems": [
                    {"type": "number", "minimum": -90, "maximum": 90},
                    {"type": "number", "minimum": -180, "maximum": 180},
                ],
                "items": False,
                "minItems": 2,
            },
        },
    ),
    SchemaCase(
        "person",
        "Make up a person with an address.",
        _object(
            {
                "name": {"type": "string", "minLength": 2, "maxLength": 24},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "address": _object(
                    {
                        "street": {"type": "string", "maxLength": 24},
                        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                        "country": {"const": "DE"},
                    }
                ),
                "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
            }
        ),
    ),
)
