"""docs/experiments.md names every field and route, and what it shows is accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quickchange_server.api.admin import experiments
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.experiments.definition import (
    OVERRIDABLE,
    Definition,
    Metric,
    RampStep,
    Shadow,
    Sticky,
    Variant,
)

DOCS = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
BODIES: dict[str, type[BaseModel]] = {
    "create": Definition,
    "outcomes": experiments.Outcomes,
    "promote": experiments.Promote,
    "stop": experiments.Stop,
}
PARTS: list[type[BaseModel]] = [Variant, Shadow, Sticky, RampStep, Metric]


@pytest.mark.parametrize(
    "body",
    [*BODIES.values(), *PARTS, experiments.Change, experiments.OutcomeBody],
    ids=lambda body: body.__name__,
)
def test_every_field_is_documented(body: type[BaseModel]) -> None:
    missing = [f for f in body.model_fields if not re.search(rf"[`\"]{f}[`\"]", DOCS)]
    assert missing == []


def test_every_override_is_documented() -> None:
    known = [name for name in OVERRIDABLE if name in CompletionRequest.model_fields]
    assert [name for name in known if f"`{name}`" not in DOCS] == []


def test_every_route_is_documented() -> None:
    last = {route.path.rpartition("/")[2] for route in experiments.router.routes}  # type: ignore[attr-defined]
    assert [word for word in last - {"{name:path}"} if word not in DOCS] == []


def test_the_bodies_of_the_commands_are_accepted() -> None:
    commands = re.findall(r"experiments(?:/\w+/)?(\w*) -H [^\n]* -d '(.*?)'", DOCS, re.DOTALL)
    assert {action for action, _ in commands} == {"", "outcomes", "promote", "stop"}
    for action, body in commands:
        BODIES[action or "create"].model_validate(json.loads(body))


def test_the_ramp_that_is_shown_is_accepted() -> None:
    (ramp,) = re.findall(r'"ramp": (\[.*\])', DOCS)
    for step in json.loads(ramp):
        RampStep.model_validate(step)
