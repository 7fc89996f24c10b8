"""What experiments keep, on both databases: audit, exposures, outcomes, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from threading import Barrier
from typing import Any

import pytest
from experiment_support import START, definition_of, experiment_of
from prometheus_client import CollectorRegistry
from sqlalchemy import func, select, update

from quickchange_server.errors import (
    ConflictError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from quickchange_server.experiments import experiment_records, outcomes
from quickchange_server.experiments.assignment import unit_of
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.experiment_records import Act
from quickchange_server.experiments.exposures import Exposures
from quickchange_server.experiments.outcomes import ReportedOutcome, StoredOutcome
from quickchange_server.experiments.registry import Experiments
from quickchange_server.experiments.sums import results_of
from quickchange_server.frontend.caller import ANYONE, Caller
from quickchange_server.frontend.request_observers import Assignment, Completed, Ending, Opened
from quickchange_server.observability.experiment_metrics import ExperimentMetrics
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions
from quickchange_server.storage.tables_experiments import (
    EXPERIMENT_EXPOSURES,
    EXPERIMENT_OUTCOMES,
    EXPERIMENTS,
)

METRICS = [{"name": "stars"}, {"name": "ok", "kind": "flag"}, {"name": "mood", "kind": "label"}]
ACME = Caller("acme", "0123", "infer")
RIVAL = Caller("rival", "4567", "infer")


class World:
    """An experiment in a database, with answers and outcomes."""

    def __init__(self, database: Database, experiment: Experiment) -> None:
        self.database = database
        self.experiment = experiment
        metrics = ExperimentMetrics(CollectorRegistry(), 4)
        self._exposures = Exposures(database, metrics)

    async def answered(
        self, completion: str, user: str, variant: str = "a", at: float = START, **changes: Any
    ) -> None:
        """An answer by `variant` to a tenant's user."""
        caller = changes.pop("caller", ACME)
        ending: Ending = changes.pop("ending", "stop")
        unit = unit_of(self.experiment.id, caller.tenant, user)
        assignment = Assignment("tone", variant, unit, "hash", experiment_id=self.experiment.id)
        assignment = replace(assignment, **changes)
        opened = Opened(completion, caller, "tone", "base", 3, 4, 1, at, assignment)
        kept = self._exposures.completed(Completed(opened, ending, completion_tokens=2))
        assert kept is not None
        await kept

    async def told(self, *given: ReportedOutcome, caller: Caller = ACME) -> list[StoredOutcome]:
        keep = partial(
            outcomes.keep, experiment=self.experiment, caller=caller, outcomes=given, now=START
        )
        return await self.database.write(keep)

    async def rows(self, table: Any) -> int:
        query = select(func.count()).select_from(table)
        return await self.database.read(lambda connection: connection.execute(query).scalar_one())


@asynccontextmanager
async def world_at(url: str) -> AsyncIterator[World]:
    database = await asyncio.to_thread(Database.open, url)
    experiment = experiment_of(metrics=METRICS)
    try:
        await database.write(
            partial(experiment_records.create, experiment=experiment, act=act("create"))
        )
        yield World(database, experiment)
    finally:
        await database.close()


def in_world(url: str, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with world_at(url) as world:
            await test(world)

    asyncio.run(run())


def act(action: experiment_records.Action) -> Act:
    return Act(ANYONE, action, START)


def told(value: Any = 1.0, name: str = "stars", **where: str) -> ReportedOutcome:
    given = {"completion": None, "unit": None, "key": None, **where}
    return ReportedOutcome(param="outcomes[0]", name=name, value=value, **given)


# --- outcomes -----------------------------------------------------------------------------------


def test_an_idempotency_key_holds_for_its_tenant_and_metric(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        await world.answered("c2", "ana", caller=RIVAL)
        first = told(completion="c1", key="k")
        (kept,) = await world.told(first)
        (again,) = await world.told(replace(first, value=5.0))
        (other_metric,) = await world.told(replace(first, name="ok", value=True))
        (other_tenant,) = await world.told(told(completion="c2", key="k"), caller=RIVAL)
        assert [one.new for one in (kept, again, other_metric, other_tenant)] == [
            True,
            False,
            True,
            True,
        ]
        unkeyed = await world.told(told(completion="c1"), told(completion="c1"))
        assert [one.new for one in unkeyed] == [True, True]

    in_world(database_url, test)


def test_of_an_idempotency_key_sent_at_once_one_outcome_is_kept(
    database_url: str,
) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        sent = await asyncio.gather(*(world.told(told(completion="c1", key="k")) for _ in range(8)))
        assert sorted(one.new for (one,) in sent) == [False] * 7 + [True]
        assert await world.rows(EXPERIMENT_OUTCOMES) == 1

    in_world(database_url, test)


def test_all_outcomes_of_a_request_are_kept_or_none(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        with pytest.raises(UnknownModelError):
            await world.told(told(completion="c1"), told(completion="c9"))
        assert await world.rows(EXPERIMENT_OUTCOMES) == 0

    in_world(database_url, test)


def test_a_unit_is_its_tenants_and_a_completion_too(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        messages = []
        for where in ({"completion": "c1"}, {"completion": "c9"}, {"unit": "ana"}):
            with pytest.raises(UnknownModelError) as raised:
                await world.told(told(**where), caller=RIVAL)
            messages.append(str(raised.value))
        assert messages[0] == messages[1].replace("c9", "c1")  # nothing tells that it is there
        await world.answered("c2", "ana", "b", caller=RIVAL)
        (kept,) = await world.told(told(unit="ana"), caller=RIVAL)
        (mine,) = await world.told(told(unit="ana"))
        assert (kept.variant, mine.variant) == ("b", "a")

    in_world(database_url, test)


def test_an_administrator_tells_outcomes_of_any_tenants_completions(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        (kept,) = await world.told(told(completion="c1"), caller=ANYONE)
        assert kept.variant == "a"

    in_world(database_url, test)


def test_a_unit_means_the_last_answer_and_no_shadow_or_refusal(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana", "a", START)
        await world.answered("c2", "ana", "b", START + 1)
        await world.answered("c3", "ana", "a", START + 2, ending="refused")
        await world.answered("c3.0", "ana", "s", START + 3, shadow=True)
        (kept,) = await world.told(told(unit="ana"))
        assert (kept.variant, kept.counted) == ("b", True)

    in_world(database_url, test)


def test_a_shadow_has_no_outcome(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1.0", "ana", "s", shadow=True)
        with pytest.raises(UnknownModelError):
            await world.told(told(completion="c1.0"))

    in_world(database_url, test)


def test_a_late_outcome_counts_where_its_answer_did(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana", "b")
        await world.answered("c2", "ana", "a", START + 9, by="state")  # stopped meanwhile
        (kept,) = await world.told(told(completion="c1"))
        (of_unit,) = await world.told(told(unit="ana"))
        assert (kept.variant, kept.counted) == ("b", True)
        assert (of_unit.variant, of_unit.counted) == ("a", False)
        results = await results_of(world.database, world.experiment)
        assert [v["count"] for v in results["outcomes"][0]["variants"]] == [0, 1]

    in_world(database_url, test)


@pytest.mark.parametrize("value", [1e300, -1e16, 10**400, float("nan"), float("inf")])
def test_a_number_too_large_to_be_squared_is_refused(database_url: str, value: float) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        with pytest.raises(InvalidRequestError, match="1e\\+15"):
            await world.told(told(value, completion="c1"))
        await world.told(told(1e15, completion="c1"), told(-(10**15), completion="c1"))
        results = await results_of(world.database, world.experiment)
        assert results["outcomes"][0]["variants"][0]["mean"] == 0.0

    in_world(database_url, test)


def test_outcomes_of_a_metric_that_came_back_as_another_kind_are_left_out(
    database_url: str,
) -> None:
    async def test(world: World) -> None:
        for number in range(3):
            await world.answered(f"c{number}", f"user-{number}")
        await world.told(told(5.0, completion="c0"))
        definition = definition_of(metrics=[{"name": "stars", "kind": "flag"}])
        world.experiment = replace(world.experiment, definition=definition)
        await world.told(told(True, completion="c1"), told(False, completion="c2"))
        results = await results_of(world.database, world.experiment)
        variant = results["outcomes"][0]["variants"][0]
        assert (variant["count"], variant["mean"]) == (2, 0.5)

    in_world(database_url, test)


# --- exposures ----------------------------------------------------------------------------------


def test_an_answer_is_on_record_once(database_url: str) -> None:
    async def test(world: World) -> None:
        for _ in range(2):
            await world.answered("c1", "ana")
        assert await world.rows(EXPERIMENT_EXPOSURES) == 1

    in_world(database_url, test)


def test_an_answer_of_a_deleted_experiment_is_not_kept(database_url: str) -> None:
    async def test(world: World) -> None:
        await world.answered("c1", "ana")
        await world.told(told(completion="c1"))
        await world.database.write(
            partial(experiment_records.remove, name="tone", act=act("delete"))
        )
        await world.answered("c2", "ana")
        assert await world.rows(EXPERIMENT_EXPOSURES) == 0
        assert await world.rows(EXPERIMENT_OUTCOMES) == 0

    in_world(database_url, test)


# --- definitions --------------------------------------------------------------------------------


def test_the_audit_trail_is_read_newest_first_and_outlives_the_experiment(
    database_url: str,
) -> None:
    async def test(world: World) -> None:
        def grown(old: Experiment) -> Experiment:
            return replace(old, version=old.version + 1)

        change = partial(experiment_records.change, name="tone", act=act("update"), make=grown)
        await world.database.write(change)
        await world.database.write(
            partial(experiment_records.remove, name="tone", act=act("delete"))
        )
        entries = await world.database.read(
            partial(experiment_records.audit, name="tone", limit=10)
        )
        assert [entry["action"] for entry in entries] == ["delete", "update", "create"]
        assert [entries[1][side]["version"] for side in ("before", "after")] == [1, 2]
        latest = await world.database.read(partial(experiment_records.audit, name="tone", limit=1))
        assert latest == entries[:1]

    in_world(database_url, test)


def test_of_two_replicas_that_take_a_name_at_once_one_gets_it(database_url: str) -> None:
    both = Barrier(2)

    async def one(number: int) -> bool:
        database = await asyncio.to_thread(Database.open, database_url)
        experiment = replace(experiment_of(), id=f"{number:032}")
        await asyncio.to_thread(both.wait, 30)
        try:
            await database.write(
                partial(experiment_records.create, experiment=experiment, act=act("create"))
            )
        except ConflictError:
            return False
        finally:
            await database.close()
        return True

    async def run() -> list[bool]:
        return list(await asyncio.gather(one(1), one(2)))

    assert sorted(asyncio.run(run())) == [False, True]


def test_a_change_of_a_version_that_is_past_is_refused(database_url: str) -> None:
    async def test(world: World) -> None:
        change = partial(experiment_records.change, name="tone", act=act("update"), version=2)
        with pytest.raises(ConflictError, match="at version 1"):
            await world.database.write(partial(change, make=lambda old: old))

    in_world(database_url, test)


# --- replicas -----------------------------------------------------------------------------------


def test_an_experiment_that_can_not_be_read_stays_and_keeps_no_other_from_changing(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: World) -> None:
        revisions = Revisions(world.database)
        experiments = Experiments(world.database, revisions)
        await revisions.look()
        newer = update(EXPERIMENTS).values(document='{"id": "of a newer version"}')
        await world.database.write(lambda connection: connection.execute(newer).rowcount)
        await experiments.create(definition_of(name="other"), ANYONE)
        assert set(experiments.all) == {"tone", "other"}
        assert experiments.get("tone") == world.experiment
        assert "tone can't be read" in caplog.text
        started_later = Experiments(world.database, revisions)
        await revisions.look()
        assert set(started_later.all) == {"other"}

    in_world(database_url, test)


def test_a_change_that_is_made_is_answered_though_the_database_goes_away_behind_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: World) -> None:
        revisions = Revisions(world.database)
        experiments = Experiments(world.database, revisions)
        await revisions.look()

        async def away(_query: object) -> None:
            raise UnavailableError("gone")

        with monkeypatch.context() as patched:
            patched.setattr(world.database, "read", away)
            assert (await experiments.pause("tone", ANYONE)).state == "paused"
        assert "a little later" in caplog.text
        await revisions.look()
        assert experiments.get("tone").state == "paused"

    in_world(database_url, test)
