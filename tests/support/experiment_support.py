"""Definitions for tests."""

from __future__ import annotations

from typing import Any

from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.experiment import Experiment, created

START = 1_000_000.0


def body_of(**changes: Any) -> dict[str, Any]:
    variants = [{"name": "a", "model": "base"}, {"name": "b", "model": "sql"}]
    return {"name": "tone", "variants": variants, **changes}


def definition_of(**changes: Any) -> Definition:
    return Definition.model_validate(body_of(**changes))


def experiment_of(**changes: Any) -> Experiment:
    return created("0123abcd", definition_of(**changes), START)
