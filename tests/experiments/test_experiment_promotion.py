"""Promotions that are cut off between their two steps, and those that the disk refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from experiment_support import definition_of

from quickchange_server.errors import ConflictError
from quickchange_server.experiments.experiment import Pointed
from quickchange_server.experiments.promotion import Promotions
from quickchange_server.experiments.registry import Experiments
from quickchange_server.frontend.caller import ANYONE
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store


@dataclass(frozen=True)
class World:
    store: Store
    experiments: Experiments
    promotions: Promotions

    @property
    def alias(self) -> str | None:
        found = self.store.aliases().get("live")
        return None if found is None else str(found)


@asynccontextmanager
async def replica_in(folder: Path) -> AsyncIterator[World]:
    """One of the servers on the same store and database."""
    database = Database.open(f"sqlite:///{folder}/test.sqlite3")
    try:
        store, experiments = Store(folder), Experiments(database, Revisions(database))
        yield World(store, experiments, Promotions(store, experiments))
    finally:
        await database.close()


@asynccontextmanager
async def world_in(folder: Path, adapter: CanonicalAdapter) -> AsyncIterator[World]:
    """An experiment over the adapters `old` and `sql`, whose alias points at `old`."""
    store = Store(folder)
    for name in ("old", "sql"):
        store.add(name, adapter)
    store.alias("live", "old")
    async with replica_in(folder) as world:
        await world.experiments.create(definition_of(alias="live"), ANYONE)
        yield world


def test_a_promotion_that_a_crash_cut_off_is_finished_by_sending_it_again(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as world:
            await world.experiments.promote("tone", ANYONE, "b", Pointed("old"), 1)  # and no more
            moved = await world.promotions.promote("tone", ANYONE, "b")
            assert (world.alias, moved.before) == ("sql", Pointed("old"))
            assert len(world.experiments.get("tone").promotions) == 1
            await world.promotions.roll_back("tone", ANYONE)
            assert world.alias == "old"

    asyncio.run(run())


def test_a_promotion_that_a_crash_cut_off_can_be_rolled_back(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as world:
            await world.experiments.promote("tone", ANYONE, "b", Pointed("old"), 1)
            await world.promotions.roll_back("tone", ANYONE)
            assert world.alias == "old"
            assert world.experiments.get("tone").promotions == ()

    asyncio.run(run())


def test_a_promotion_behind_which_the_alias_was_moved_by_hand_is_another(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as world:
            world.store.add("hand", small_adapter)
            await world.promotions.promote("tone", ANYONE, "b")
            world.store.alias("live", "hand")
            await world.promotions.promote("tone", ANYONE, "b")
            await world.promotions.roll_back("tone", ANYONE)
            assert world.alias == "hand"

    asyncio.run(run())


def test_a_promotion_that_the_disk_refuses_is_not_noted(
    tmp_path: Path, small_adapter: CanonicalAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as world:
            monkeypatch.setattr(world.store, "alias", full)
            with pytest.raises(OSError, match="No space"):
                await world.promotions.promote("tone", ANYONE, "b")
            assert world.alias == "old"
            assert world.experiments.get("tone").promotions == ()

    asyncio.run(run())


def test_a_promotion_sent_again_to_another_replica_is_made_once(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as one, replica_in(tmp_path) as other:
            await one.promotions.promote("tone", ANYONE, "b")
            await other.promotions.promote("tone", ANYONE, "b")
            await one.promotions.roll_back("tone", ANYONE)
            assert other.alias == "old"
            with pytest.raises(ConflictError):
                await other.promotions.roll_back("tone", ANYONE)

    asyncio.run(run())


def test_of_promotions_through_two_replicas_at_once_one_is_made_or_both_in_turn(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as one, replica_in(tmp_path) as other:
            both = [w.promotions.promote("tone", ANYONE, "b") for w in (one, other)]
            outcomes = await asyncio.gather(*both, return_exceptions=True)
            failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            assert all(isinstance(error, ConflictError) for error in failed)
            assert len(failed) < 2
            assert one.alias == "sql"
            assert len((await other.experiments.latest("tone")).promotions) == 1

    asyncio.run(run())


def test_a_promotion_of_what_another_replica_has_changed_meanwhile_is_refused(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as one, replica_in(tmp_path) as other:
            version = (await other.experiments.latest("tone")).version
            await one.experiments.pause("tone", ANYONE)
            with pytest.raises(ConflictError, match="is at version"):
                await other.experiments.promote("tone", ANYONE, "b", None, version)

    asyncio.run(run())
