"""Promotions that are cut off between their two steps, and those that the disk refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from experiment_support import definition_of

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
async def world_in(folder: Path, adapter: CanonicalAdapter) -> AsyncIterator[World]:
    """An experiment over the adapters `old` and `sql`, whose alias points at `old`."""
    store = Store(folder)
    for name in ("old", "sql"):
        store.add(name, adapter)
    store.alias("live", "old")
    database = Database.open(f"sqlite:///{folder}/test.sqlite3")
    try:
        experiments = Experiments(database, Revisions(database))
        await experiments.create(definition_of(alias="live"), ANYONE)
        yield World(store, experiments, Promotions(store, experiments))
    finally:
        await database.close()


def test_a_promotion_that_a_crash_cut_off_is_finished_by_sending_it_again(
    tmp_path: Path, small_adapter: CanonicalAdapter
) -> None:
    async def run() -> None:
        async with world_in(tmp_path, small_adapter) as world:
            await world.experiments.promote("tone", ANYONE, "b", Pointed("old"))  # and no more
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
            await world.experiments.promote("tone", ANYONE, "b", Pointed("old"))
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
