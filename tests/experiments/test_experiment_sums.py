"""Sums by SQL beside the same sums by hand, over weights that change and units that move."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from zlib import crc32

import pytest
from experiment_support import START, experiment_of
from sqlalchemy import Connection, insert

from quickchange_server.experiments import experiment as changes
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.experiment_records import Act, create
from quickchange_server.experiments.statistics.analysis import Sums
from quickchange_server.experiments.sums import ExperimentSums, tally
from quickchange_server.frontend.caller import ANYONE
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables_experiments import EXPERIMENT_EXPOSURES, EXPERIMENT_OUTCOMES

METRICS = [
    {"name": "stars"},
    {"name": "ok", "kind": "flag", "missing": 0},
    {"name": "mood", "kind": "label"},
]
Rows = list[dict[str, Any]]


def moved_experiment() -> Experiment:
    """Half and half for five seconds, then a quarter and three quarters."""
    old = experiment_of(metrics=METRICS)
    variants = [
        v.model_copy(update={"weight": w})
        for v, w in zip(old.definition.variants, (1, 3), strict=True)
    ]
    return changes.updated(old, old.definition.model_copy(update={"variants": variants}), START + 5)


def made_up(experiment: Experiment, seed: int) -> tuple[Rows, Rows]:
    """Exposures and outcomes of thirty units, some of which change the variant."""
    chance = random.Random(seed)
    exposures: Rows = []
    outcomes: Rows = []
    for number in range(150):
        stretch = int(number > 60)
        unit = f"unit-{chance.randrange(30)}"
        exposure = {
            "completion": f"c{number}",
            "variant": "b" if crc32(f"{unit}/{stretch}".encode()) % 2 else "a",
            "experiment": experiment.id,
            "unit": unit,
            "by": "hash",
            "counted": chance.random() < 0.9,
            "shadow": False,
            "stretch": stretch,
            "at": START + number,
            "tenant": "t",
            "ending": chance.choice(["stop", "length", "failed"]),
            "seconds": chance.random(),
            "first_token": chance.choice([None, chance.random()]),
            "prompt_tokens": 3,
            "tokens": chance.randrange(100),
            "drafted": 0,
            "accepted": 0,
        }
        exposure["accepted"] = chance.randrange(exposure["tokens"] + 1)
        exposures.append(exposure)
        kept = {k: exposure[k] for k in ("experiment", "variant", "unit", "completion", "counted")}
        for name in chance.sample(["stars", "ok", "mood"], 2):
            value = {"stars": chance.gauss(3, 1), "ok": float(chance.random() < 0.4), "mood": None}
            label = chance.choice(["glad", "sad"]) if name == "mood" else None
            more = {"name": name, "value": value[name], "label": label}
            outcomes.append({**kept, **more, "at": START, "tenant": "t"})
    return exposures, outcomes


def tallied(url: str, experiment: Experiment, exposures: Rows, outcomes: Rows) -> ExperimentSums:
    async def run() -> ExperimentSums:
        database = await asyncio.to_thread(Database.open, url)
        act = Act(ANYONE, "create", START)
        try:
            await database.write(partial(create, experiment=experiment, act=act))
            await database.write(partial(_fill, exposures=exposures, outcomes=outcomes))
            return await database.read(partial(tally, experiment=experiment))
        finally:
            await database.close()

    return asyncio.run(run())


def _fill(connection: Connection, exposures: Rows, outcomes: Rows) -> None:
    connection.execute(insert(EXPERIMENT_EXPOSURES), exposures)
    connection.execute(insert(EXPERIMENT_OUTCOMES), outcomes)


def by_hand(
    exposures: Rows,
    rows: Rows,
    value_of: Callable[[dict[str, Any]], float | None],
    missing: float | None = None,
) -> list[list[Sums]]:
    """[stretch][variant], by the definition: a unit's mean under the variant that it got first."""
    counted = [row for row in exposures if row["counted"]]
    first: dict[str, tuple[int, str]] = {}
    for row in counted:
        first.setdefault(row["unit"], (row["stretch"], row["variant"]))
    values: dict[str, list[float]] = {unit: [] for unit in first} if missing is not None else {}
    for row in rows:
        value = value_of(row)
        if row["counted"] and value is not None and row["variant"] == first[row["unit"]][1]:
            values.setdefault(row["unit"], []).append(value)
    means = {k: sum(v) / len(v) if v else missing or 0.0 for k, v in values.items()}
    sums = []
    for stretch in (0, 1):
        for variant in "ab":
            mine = [m for unit, m in means.items() if first[unit] == (stretch, variant)]
            sums.append(Sums(len(mine), sum(mine), sum(m * m for m in mine)))
    return [sums[:2], sums[2:]]


def assert_same(found: Any, expected: list[list[Sums]]) -> None:
    for found_row, row in zip(found, expected, strict=True):
        for one, other in zip(found_row, row, strict=True):
            assert one.count == other.count
            assert one.total == pytest.approx(other.total)
            assert one.squares == pytest.approx(other.squares)


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_by_hand(database_url: str, seed: int) -> None:
    experiment = moved_experiment()
    exposures, outcomes = made_up(experiment, seed)
    sums = tallied(database_url, experiment, exposures, outcomes)
    named: dict[str, Rows] = defaultdict(list)
    for row in outcomes:
        named[row["name"]].append(row)
    found = {(o.name, o.label): o.sums for o in sums.outcomes}
    assert_same(found["stars", None], by_hand(exposures, named["stars"], lambda r: r["value"]))
    assert_same(found["ok", None], by_hand(exposures, named["ok"], lambda r: r["value"], 0.0))
    for label in ("glad", "sad"):
        expected = by_hand(exposures, named["mood"], lambda r, w=label: float(r["label"] == w))
        assert_same(found["mood", label], expected)

    def answered(row: dict[str, Any], column: str) -> float | None:
        return row[column] if row["ending"] in ("stop", "length") else None

    def accepted_per_step(row: dict[str, Any]) -> float | None:
        tokens, accepted = answered(row, "tokens"), row["accepted"]
        return accepted / (tokens - accepted) if tokens and tokens > accepted else None

    found = {(o.name, None): o.sums for o in sums.automatic}
    for name, value_of in {
        "latency": lambda r: answered(r, "seconds"),
        "first_token": lambda r: r["first_token"],
        "tokens": lambda r: answered(r, "tokens"),
        "accepted_per_step": accepted_per_step,
        "failed": lambda r: float(r["ending"] == "failed"),
    }.items():
        assert_same(found[name, None], by_hand(exposures, exposures, value_of))


def test_units_are_counted_where_they_were_first_seen(database_url: str) -> None:
    experiment = moved_experiment()
    exposures, outcomes = made_up(experiment, 7)
    sums = tallied(database_url, experiment, exposures, outcomes)
    first: dict[str, Any] = {}
    for row in exposures:
        if row["counted"]:
            first.setdefault(row["unit"], (row["stretch"], row["variant"]))
    seen = list(first.values())
    for number, stretch in enumerate(sums.stretches):
        assert list(stretch.units) == [seen.count((number, variant)) for variant in "ab"]
    weights = [stretch.weights[1] / sum(stretch.weights) for stretch in sums.stretches]
    assert weights == [0.5, 0.75]
