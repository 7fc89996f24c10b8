"""What a compiled schema lets through is what jsonschema, which nobody here wrote, calls valid.

Texts are drawn at random from the masks, byte by byte, over every keyword that is enforced.
"""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
from drawn_texts import GRAMMARS, PADDED, compiled, drawn
from hypothesis import HealthCheck, assume, given, settings
from text_support import END, byte_text

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.compiler import Masked
from quickchange_server.structured_output.errors import ConstraintError
from quickchange_server.structured_output.grammar import TokenGrammars

numbers = st.integers(-40, 40) | st.sampled_from([-2.5, 0.1, 0.75, 3.25, 1e3])
counts = st.integers(0, 3)


def _some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def _typed(name: str, rest: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return rest.map(lambda more: {"type": name, **more})


_VALUES = st.none() | st.booleans() | numbers | st.text('ab"\\\né😀/', max_size=3)
scalars = st.one_of(
    _typed(
        "integer",
        _some(
            minimum=numbers, maximum=numbers, exclusiveMinimum=numbers, exclusiveMaximum=numbers,
            multipleOf=st.sampled_from([1, 2, 7]),
        ),
    ),
    _typed("number", _some(minimum=numbers, maximum=numbers, exclusiveMaximum=numbers)),
    _typed("number", _some(multipleOf=st.sampled_from([0.5, 0.25, 3]))),
    _typed("string", _some(minLength=counts, maxLength=counts.map(lambda n: n + 2))),
    _typed(
        "string",
        _some(pattern=st.sampled_from(["^a+$", "b", "^[a-c]{2}", "x|yz$", '^"\\\\?$', "^\\d\\w$"])),
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
    st.lists(_VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    (st.text(max_size=3) | st.just({"a": [1, {"b": None}]})).map(lambda value: {"const": value}),
)  # fmt: skip


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "a b", "é", "a/b", '"'])
    return _typed(
        "object",
        _some(
            properties=st.dictionaries(names, inner, max_size=3),
            required=st.lists(names, max_size=2, unique=True),
            additionalProperties=st.booleans() | inner,
            maxProperties=st.integers(1, 3),
            minProperties=st.integers(0, 1),
            patternProperties=st.dictionaries(st.sampled_from(["^a", "^x_"]), inner, max_size=1),
        ),
    )


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return _typed(
        "array",
        _some(
            items=st.just(False) | inner,
            prefixItems=st.lists(inner, min_size=1, max_size=2),
            minItems=counts,
            maxItems=counts,
        ),
    )


def _several(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    few = st.lists(inner, min_size=1, max_size=2)
    return (
        few.map(lambda parts: {"anyOf": parts})
        | few.map(lambda parts: {"allOf": parts})
        | few.map(lambda parts: {"oneOf": parts})
    )


nested = st.recursive(
    scalars, lambda inner: _objects(inner) | _arrays(inner) | _several(inner), max_leaves=5
)
schemas = nested | nested.map(lambda schema: {"$defs": {"d": schema}, "$ref": "#/$defs/d"})


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(schema=schemas, seed=st.integers(0, 10**6))
def test_every_text_that_a_schema_lets_through_is_valid(schema: Any, seed: int) -> None:
    matcher = compiled(schema)
    assume(matcher is not None)
    written = drawn(matcher, seed)
    if written is not None:
        jsonschema.Draft202012Validator(schema).validate(
            json.loads(written, parse_float=finite_float)
        )


def finite_float(written: str) -> float:
    """JSON's numbers have no bound; the judge's have."""
    value = float(written)
    assume(math.isfinite(value))
    return value


FORMATS = {"date", "date-time", "ipv4", "ipv6", "uuid", "email", "time"}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_text_of_a_format_has_that_format(name: str) -> None:
    schema = {"type": "string", "format": name}
    judge = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    compiled = GRAMMARS.compile(Constraint("json_schema", json.dumps(schema)))
    for seed in range(30):
        written = drawn(compiled.copy(), seed)
        # RFC 3339 has a year 0, Python none; leap seconds the judge takes at midnight alone
        if written is not None and b"0000-" not in written and b":60" not in written:
            judge.validate(json.loads(written))


@pytest.mark.parametrize(
    ("schema", "said", "lawful"),
    [
        ({"type": "integer", "minimum": 3}, "-", False),
        ({"type": "integer", "maximum": 3}, "3", True),
        ({"type": "object", "additionalProperties": False}, '{"a"', False),
        ({"properties": {"a": {"type": "integer"}}}, '{"\\u0061"', False),
        ({"type": "object"}, "{" + " " * 60, False),
        ({"type": "object"}, '{\n  "a": [1, 2.5e3, "é\\n"]\n}', True),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}},
         "[[],[[]]]", True),
    ],
)  # fmt: skip
def test_a_text_is_allowed_as_far_as_the_schema_does(schema: Any, said: str, lawful: bool) -> None:
    matcher = GRAMMARS.compile(Constraint("json_schema", json.dumps(schema)))
    tokens = list(said.encode())
    assert (matcher.allowed(tokens) == len(tokens)) is lawful


def test_the_end_is_the_last_token_allowed() -> None:
    matcher = GRAMMARS.compile(Constraint("regex", "a{1,9}"))
    assert matcher.allowed([97, 97, END, 97]) == 3
    assert matcher.allowed([END]) == 0
    assert matcher.allowed([97, 98, 97]) == 1


def test_masks_behind_drafts_are_those_of_the_text_with_them() -> None:
    matcher = GRAMMARS.compile(Constraint("regex", "ab?c*"))
    bits = np.zeros((3, -(-PADDED // 32)), dtype=np.int32)
    GRAMMARS.fill([Masked(matcher, 0, (97, 98))], bits)
    for count in range(3):
        fresh = GRAMMARS.compile(Constraint("regex", "ab?c*"))
        for token in (97, 98)[:count]:
            fresh.advance(token)
        alone = np.zeros((1, bits.shape[1]), dtype=np.int32)
        GRAMMARS.fill([Masked(fresh, 0, ())], alone)
        assert (bits[count] == alone[0]).all()
    assert matcher.allowed([97]) == 1  # it stays where it was


def test_a_schema_without_any_text_is_refused() -> None:
    with pytest.raises(ConstraintError, match="no text"):
        GRAMMARS.compile(Constraint("json_schema", '{"$ref": "#"}'))


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(ConstraintError, match="no end-of-sequence"):
        TokenGrammars.of(byte_text(eos=frozenset()))
