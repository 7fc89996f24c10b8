"""Experiments as the server's JSON has them: results by the server's own inference on made sums."""

from __future__ import annotations

from typing import Any

from quickchange_server.experiments.statistics.analysis import (
    OutcomeSums,
    StretchUnits,
    Sums,
    analyse,
)
from quickchange_server.experiments.statistics.plan import Plan

NAMES = ("base", "tuned", "bold")
HOSTILE = '<img src=x onerror="window.hurt=1">'


def experiment(name: str, state: str = "running", description: str = "") -> dict[str, Any]:
    """An experiment as GET /v1/experiments lists it."""
    return {
        "id": name,
        "object": "experiment",
        "version": 2,
        "state": state,
        "created": 0,
        "winner": None,
        "shares": dict.fromkeys(NAMES, 1 / 3),
        "promoted": None,
        "definition": {"name": name, "description": description, "sticky": {"by": "user"}},
    }


def flag(name: str, shares: tuple[float, ...], units: int) -> OutcomeSums:
    """The share of each variant's units that have it."""
    ones = [round(share * units) for share in shares]
    return OutcomeSums(name, "flag", [[Sums(units, one, one) for one in ones]])


def amount(name: str, means: tuple[float, ...], units: int) -> OutcomeSums:
    """A number with the standard deviation 1, of which less is better."""
    sums = [Sums(units, mean * units, (1 + mean**2) * units) for mean in means]
    return OutcomeSums(name, "number", [sums], "decrease", margin=0.05)


def results(
    name: str,
    *told: OutcomeSums,
    units: tuple[int, ...] = (2000, 2000, 2000),
    automatic: tuple[OutcomeSums, ...] = (),
) -> dict[str, Any]:
    """A result as GET …/NAME/results has it. `units`: assigned, with equal weights."""
    stretches = [StretchUnits((1, 1, 1), units)]
    found = analyse(NAMES, [*told, *automatic], stretches, Plan()).to_json()
    every = found.pop("outcomes")
    return {
        "id": name,
        "object": "experiment.results",
        "version": 2,
        "state": "running",
        "control": NAMES[0],
        "minimum": 100,
        **found,
        "outcomes": every[: len(told)],
        "automatic": every[len(told) :],
        "requests": {each: {"stop": 5, "length": 2} for each in NAMES},
        "shadows": {},
    }


def answers(*named: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, list[Any]]:
    """What the routes answer, by path."""
    listed = {"object": "list", "data": [each for each, _ in named]}
    of_each = {f"/v1/experiments/{e['id']}/results": [200, result] for e, result in named}
    return {"/v1/experiments": [200, listed], **of_each}
