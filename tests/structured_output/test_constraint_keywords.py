"""Keywords that are not enforced are refused by name, at their place."""

from __future__ import annotations

from typing import Any

import pytest

from quickchange_server.errors import InvalidRequestError
from quickchange_server.structured_output.schema_keywords import (
    ENFORCED,
    MOST_PARTS,
    check_keywords,
)


def refused(schema: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_keywords(schema, "schema")
    return caught.value


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "array", "uniqueItems": True}, "schema.uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "schema.properties.a.not"),
        ({"anyOf": [{}, {"if": {}}]}, "schema.anyOf[1].if"),
        ({"$defs": {"a": {"nullable": True}}}, "schema.$defs.a.nullable"),
        ({"items": {"propertyNames": {}}}, "schema.items.propertyNames"),
        ({"x-guidance": {"lenient": True}}, "schema.x-guidance"),
        ({"properties": {"age": {"minimum": "0"}}}, "schema.properties.age.minimum"),
        ({"properties": {"age": {"minimum": True}}}, "schema.properties.age.minimum"),
        ({"maximum": float("nan")}, "schema.maximum"),
        ({"minLength": -1}, "schema.minLength"),
        ({"minItems": 1.5}, "schema.minItems"),
        ({"minProperties": 2}, "schema.minProperties"),
        ({"multipleOf": 99_999_989}, "schema.multipleOf"),
        ({"multipleOf": 0}, "schema.multipleOf"),
        ({"format": "idn-email"}, "schema.format"),
        ({"type": "integre"}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"items": [{"type": "integer"}]}, "schema.items"),
        ({"$ref": "https://example.com/schema"}, "schema.$ref"),
        ({"properties": ["a"]}, "schema.properties"),
        ({"properties": {"a": 5}}, "schema.properties.a"),
        ({"enum": []}, "schema.enum"),
        ({"required": "a"}, "schema.required"),
        ({"pattern": 5}, "schema.pattern"),
        ({"const": "a\x1f"}, "schema.const"),
        ({"enum": [1, {"a": ["\x00"]}]}, "schema.enum"),
        ({"properties": {"a\x01": {}}}, "schema.properties"),
        ({"required": ["\x02"]}, "schema.required"),
        ({"allOf": {}}, "schema.allOf"),
    ],
)
def test_the_place_of_the_first_fault_is_named(schema: Any, place: str) -> None:
    error = refused(schema)
    assert error.param == place
    assert error.message.startswith(f"{place}: ")


def test_annotations_stand_anywhere() -> None:
    check_keywords(
        {
            "strict": True,
            "title": "t",
            "description": "d",
            "default": 1,
            "x-order": 2,
            "items": {"examples": []},
        },
        "schema",
    )


def test_a_property_may_have_any_name() -> None:
    check_keywords({"properties": {"not": {"type": "integer"}, "if": True}}, "schema")


def test_values_of_enums_and_consts_are_no_schemas() -> None:
    check_keywords({"enum": [{"not": 1}], "const": {"uniqueItems": 5}}, "schema")


def test_a_schema_that_is_too_deep_or_too_wide_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"items": deep}
    assert refused(deep).param == "schema"
    wide = {"properties": {f"p{i}": {} for i in range(MOST_PARTS + 1)}}
    assert "simplify" in refused(wide).message


def test_every_enforced_keyword_has_its_values_checked() -> None:
    for keyword in ENFORCED - {"const"}:
        assert refused({keyword: object()}).param == f"schema.{keyword}"
