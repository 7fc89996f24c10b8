"""The name of a wrong field in an error: the client's own path, whatever the model is made of."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from quickchange_server.api.error_responses import from_validation


class Named(BaseModel):
    kind: Literal["named"]
    sizes: list[int]


class Outer(BaseModel):
    choice: Literal["none", "auto"] | Named
    labels: dict[str, int] = {}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"choice": "never"}, "choice"),
        ({"choice": {"kind": "named"}}, "choice.sizes"),
        ({"choice": {"kind": "named", "sizes": [1, "x"]}}, "choice.sizes[1]"),
        ({"choice": {"kind": "other", "sizes": []}}, "choice.kind"),
        ({"choice": 1}, "choice"),
        ({}, "choice"),
        ({"choice": "auto", "labels": {"a b": "x"}}, "labels.a b"),
    ],
)
def test_a_unions_branches_are_not_in_the_name(body: Any, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Outer).validate_python(body)
    assert from_validation(list(caught.value.errors()), body).param == param
