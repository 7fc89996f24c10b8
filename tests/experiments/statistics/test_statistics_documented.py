"""The result's guide names every field and every decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from quickchange_server.experiments.statistics.analysis import (
    OutcomeSums,
    StretchUnits,
    Sums,
    analyse,
)
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.experiments.statistics.result_types import Decision

GUIDES = sorted((Path(__file__).parents[3] / "docs").glob("experiments*.md"))
WORDS = "\n".join(guide.read_text(encoding="utf-8") for guide in GUIDES)


def fields(shown: object) -> set[str]:
    """All keys, however deep, but not the variants' names."""
    if isinstance(shown, dict):
        return set(shown).union(*(fields(part) for part in shown.values())) - {"base", "new"}
    if isinstance(shown, list):
        return set().union(*(fields(part) for part in shown))
    return set()


def shown() -> dict[str, Any]:
    sums = [[Sums(10, 5, 5), Sums(10, 6, 6)]]
    outcome = OutcomeSums("liked", "flag", sums)
    return analyse(["base", "new"], [outcome], [StretchUnits((1, 1), (10, 10))], Plan()).to_json()


@pytest.mark.parametrize("field", sorted(fields(shown())))
def test_every_field_is_in_the_guide(field: str) -> None:
    assert f'"{field}"' in WORDS


@pytest.mark.parametrize("decision", get_args(Decision))
def test_every_decision_is_in_the_guide(decision: str) -> None:
    assert f"`{decision}`" in WORDS
