"""What a definition may say; each refusal names its field."""

from __future__ import annotations

from typing import Any

import pytest
from experiment_support import body_of, definition_of
from pydantic import ValidationError

from quickchange_server.api.error_responses import from_validation
from quickchange_server.errors import InvalidRequestError
from quickchange_server.experiments.definition import Definition
from quickchange_store.errors import InvalidNameError

A, B = {"name": "a", "model": "base"}, {"name": "b", "model": "sql"}


def refusal_of(body: dict[str, Any]) -> InvalidRequestError:
    try:
        Definition.model_validate(body)
    except ValidationError as error:
        return from_validation(list(error.errors()))
    except InvalidRequestError as error:
        return error
    raise AssertionError("accepted")


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"variants": [A]}, "variants", "at least 2"),
        ({"variants": [A, A]}, "variants", "twice"),
        ({"variants": [A, {"name": "b"}]}, "variants", "either model"),
        ({"variants": [A, {"name": "b c", "model": "x"}]}, "variants[1].name", "letters"),
        ({"variants": [{**A, "weight": 0}, {**B, "weight": 0}]}, "variants", "zero"),
        ({"variants": [A, {**B, "weight": -1}]}, "variants[1].weight", "greater"),
        ({"variants": [A, {**B, "overrides": {"n": 2}}]}, "variants[1].overrides", "n: can't"),
        (
            {"variants": [A, {**B, "overrides": {"temperature": 9}}]},
            "variants[1].overrides",
            "temperature",
        ),
        ({"control": "c"}, "control", "there are a, b"),
        ({"sticky": {"by": "header"}}, "sticky.name", "required"),
        ({"sticky": {"by": "user", "name": "x"}}, "sticky.name", "no sense"),
        ({"sticky": {"by": "random"}, "deny": ["u"]}, "sticky", "choose user"),
        ({"allow": {"u": "c"}}, "allow", "no variant 'c'"),
        ({"allow": {"u": "a"}, "deny": ["u"]}, "deny", "allow as well"),
        ({"ramp": [{"after": 1}]}, "ramp", "share or weights"),
        ({"ramp": [{"share": 0.5}]}, "ramp", "at or after"),
        ({"ramp": [{"after": 1, "weights": {"c": 1}}]}, "ramp", "no variant 'c'"),
        ({"ramp": [{"after": 1, "weights": {"a": 0}}]}, "variants", "zero"),
        ({"shadows": [{"name": "a", "model": "x"}]}, "variants", "twice"),
        ({"metrics": [{"name": "latency"}]}, "metrics", "by the server"),
        ({"metrics": [{"name": "ok", "kind": "flag", "missing": 2}]}, "metrics", "0 or 1"),
        ({"alpha": 0}, "alpha", "greater"),
        ({"wheight": 1}, "wheight", "unknown"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(
    changes: dict[str, Any], param: str, says: str
) -> None:
    error = refusal_of(body_of(**changes))
    assert error.param == param
    assert says in error.message


@pytest.mark.parametrize("name", ["", "base", "a b", "tone/results"])
def test_names_are_as_adapters_names_and_no_routes(name: str) -> None:
    with pytest.raises((ValidationError, InvalidNameError)):
        definition_of(name=name)


def test_the_first_variant_is_the_control_unless_another_is_named() -> None:
    assert definition_of().default.name == "a"
    assert definition_of(control="b").default.name == "b"


def test_a_share_of_a_ramp_scales_all_but_the_control() -> None:
    definition = definition_of(ramp=[{"after": 0, "share": 0.2}])
    assert list(definition.stages())[1] == pytest.approx({"a": 1.8, "b": 0.2})
