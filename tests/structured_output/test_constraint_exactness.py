"""Numbers at their extremes and schemas without any text: exact, or refused at a place inside."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
from drawn_texts import GRAMMARS, compiled, drawn
from hypothesis import HealthCheck, assume, given, settings

from quickchange_server.errors import InvalidRequestError
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.pattern_size import LARGEST, written_out
from quickchange_server.structured_output.satisfiability import pruned
from quickchange_server.structured_output.schema_keywords import check_schema

EDGE = 2**53
edges = st.sampled_from([EDGE, 2**31, 2**32, 2**63, 2**64, 10**15, 10**400, 1, 0])
integers = st.builds(lambda edge, off, sign: sign * (edge + off), edges, st.integers(-2, 2),
                     st.sampled_from([1, -1]))  # fmt: skip
decimals = st.sampled_from(
    [0.1 + 0.2, 1e22, 1e-7, 1e300, -1e300, 5e-324, math.inf, -0.0, 1.0, 1234567890.0123457, 1e16]
)
numbers = integers | decimals
values = st.recursive(
    numbers | st.sampled_from([None, True, "a", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
leaves = st.one_of(
    values.map(lambda value: {"const": value}),
    st.lists(values, min_size=1, max_size=3).map(lambda given: {"enum": given}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": numbers,
            "maximum": numbers,
            "exclusiveMinimum": numbers,
            "exclusiveMaximum": numbers,
            "multipleOf": st.sampled_from([1, 3, 0.5, 9999, 10**4, 2**40]),
            "default": values,
        },
    ),
)
nested = st.one_of(
    leaves,
    leaves.map(lambda inner: {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}),
    leaves.map(
        lambda inner: {
            "type": "object",
            "properties": {"u": {"$ref": "#/$defs/a~1b"}},
            "required": ["u"],
            "additionalProperties": False,
            "$defs": {"a/b": inner},
        }
    ),
    st.lists(leaves, min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
    st.lists(leaves, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.filter_too_much])
@given(schema=nested, seed=st.integers(0, 99))
def test_a_number_is_exact_or_refused_at_its_place(schema: Any, seed: int) -> None:
    matcher = compiled(schema)
    assume(matcher is not None)
    assert matcher is not None
    written = drawn(matcher, seed)
    if written is not None:
        value = json.loads(written)
        jsonschema.Draft202012Validator(json.loads(json.dumps(schema))).validate(value)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": EDGE}, str(EDGE)),
        ({"enum": [-EDGE, "x"]}, str(-EDGE)),
        ({"type": "integer", "minimum": EDGE - 1, "maximum": EDGE - 1}, str(EDGE - 1)),
        ({"const": 0.1 + 0.2}, "0.30000000000000004"),
        ({"type": "integer", "default": 2**70, "maximum": 3}, "3"),
        (True, '[1, {"a": null}]'),
        ({"properties": {"a": True, "b": False}}, '{"a": [2]}'),
    ],
)
def test_what_is_within_bounds_is_written(schema: Any, text: str) -> None:
    check_schema(schema, "schema")
    tokens = list(text.encode())
    matcher = GRAMMARS.compile(Constraint("json_schema", json.dumps(schema)))
    assert matcher.allowed(tokens) == len(tokens)


FORBIDDEN = {"properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
CYCLE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"const": EDGE + 1}, "const"),
        ({"enum": [1, {"a": [2**63]}]}, "enum"),
        ({"minimum": 10**400}, "minimum"),
        ({"maximum": math.inf}, "maximum"),
        ({"multipleOf": 2**64}, "multipleOf"),
        ({"const": math.inf}, "const"),
        ({"properties": {"id": {"const": 2**60 + 1}}}, "properties.id.const"),
        ({"allOf": [{"multipleOf": n} for n in (9999, 9998, 9997)]}, "multipleOf"),
        ({"minLength": 10**9}, "minLength"),
        ({"pattern": "(a{999}){999}"}, "pattern"),
        ({"patternProperties": {"a{99999}": {}}}, "patternProperties"),
        ({"const": "\x7f"}, "const"),
        ({"const": "\ud800"}, "const"),
        ({"$ref": "#/$defs/a"}, "$ref"),
        ({"$ref": "#/required", "required": ["a"]}, "$ref"),
        (False, ""),
        (CYCLE, "properties.next"),
        ({"type": "object", "required": ["zz"], **FORBIDDEN}, "required"),
        ({"allOf": [FORBIDDEN, {"type": "object", "required": ["zz"]}]}, "allOf[1].required"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "items"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "items"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "minimum"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "exclusiveMinimum"),
        ({"type": "integer", "minimum": 1, "maximum": 9, "multipleOf": 10}, "minimum"),
        ({"type": "object", "required": ["a", "b"], "maxProperties": 1}, "maxProperties"),
        ({"type": "object", "minProperties": 1, "additionalProperties": False}, "minProperties"),
        ({"type": "string", "enum": [1, None]}, "enum"),
        ({"type": "integer", "allOf": [{"type": "string"}]}, "type"),
        ({"allOf": [{"const": 1}, {"const": 2}]}, "const"),
        ({"anyOf": [False, {"type": "array", "minItems": 1, "items": False}]}, "anyOf"),
        (
            {
                "$defs": {"A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}},
                                "required": ["b"]},
                          "B": {"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1}},
                "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"],
            },
            "$defs.A.properties.b",
        ),
    ],
)  # fmt: skip
def test_what_no_text_satisfies_is_refused_at_its_place(schema: Any, place: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_schema(schema, "schema")
    assert (caught.value.param or "").endswith(place)
    assert (caught.value.param or "").startswith("schema")


TREE = {
    "type": "object",
    "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["left"],
}


@pytest.mark.parametrize(
    "schema",
    [TREE, {"type": "array", "items": {"$ref": "#"}}, {"properties": CYCLE["properties"]}],
)
def test_what_may_end_is_no_cycle(schema: Any) -> None:
    assert pruned(schema) == schema


def test_an_optional_property_that_could_not_end_is_left_out() -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}, "a": {}},
              "$defs": {"n": CYCLE | {"properties": {"next": {"$ref": "#/$defs/n"}}}}}  # fmt: skip
    assert pruned(schema)["properties"] == {"next": False, "a": {}}
    matcher = GRAMMARS.compile(Constraint("json_schema", json.dumps(schema)))
    assert matcher.allowed(list(b'{"next"')) < len(b'{"next"')
    assert matcher.allowed(list(b'{"a":1}')) == len(b'{"a":1}')


names = st.sampled_from(["a", "b"])
references = st.sampled_from(["#", "#/$defs/x", "#/$defs/y"]).map(lambda to: {"$ref": to})
knots = st.recursive(
    references | st.sampled_from([True, False, {"type": "null"}, {"type": "boolean"}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=2)},
            optional={"required": st.lists(names, max_size=2, unique=True),
                      "additionalProperties": st.booleans()},
        ),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner},
                              optional={"minItems": st.integers(0, 2)}),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
    ),
    max_leaves=5,
)  # fmt: skip
plain = st.recursive(
    st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(whole=knots, x=knots, y=knots, value=plain)
def test_no_value_satisfies_what_is_called_impossible(
    whole: Any, x: Any, y: Any, value: Any
) -> None:
    schema = {"$defs": {"x": x, "y": y}, "allOf": [whole]}
    try:
        cut = pruned(schema)
    except ValueError:
        cut = False
    judge = jsonschema.Draft202012Validator
    try:
        valid = judge(schema).is_valid(value)
        assert judge(cut).is_valid(value) == valid
    except RecursionError:
        assume(False)


def test_the_largest_schema_goes_through_at_every_place() -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(990)}
    schema = {"type": "object", "properties": properties}
    matcher = compiled(schema)
    assert matcher is not None
    for token in b'{"p3": "x", "p900": "y"':
        matcher.advance(token)
        assert matcher.error is None


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("ab?c", 3), ("a{9}", 9), ("(a{9}b){2,3}", 30), (r"\{9}", 3), ("[{9}]", 1), (r"\p{Lu}{4}", 4),
     ("[^]a]{5}", 5), ("[[:alpha:]_]{5}", 5), ("a{7,}", 7)],
)  # fmt: skip
def test_an_expression_is_measured_written_out(pattern: str, size: int) -> None:
    assert written_out(pattern) == size
    assert written_out(f"({pattern}){{{LARGEST}}}") == size * LARGEST
