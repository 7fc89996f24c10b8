"""Replicas see that definitions have changed."""

from __future__ import annotations

import asyncio
import logging

import pytest
from storage_support import noted

from quickchange_server.storage import revisions as revisions_module
from quickchange_server.storage.revisions import Revisions, bump


def test_a_topic_is_called_back_at_the_first_look_and_after_each_change(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as ours, noted(database_url) as theirs:
            called: list[str] = []

            async def callback() -> None:
                called.append("keys")

            revisions = Revisions(ours)
            revisions.watch("keys", callback)
            await revisions.look()
            await revisions.look()
            assert len(called) == 1
            await theirs.write(lambda connection: bump(connection, "experiments"))
            await revisions.look()
            assert len(called) == 1
            for _ in range(2):
                await theirs.write(lambda connection: bump(connection, "keys"))
            await revisions.look()
            assert len(called) == 2

    asyncio.run(main())


def test_a_callback_that_fails_is_logged_and_called_again(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            calls = 0

            async def callback() -> None:
                nonlocal calls
                calls += 1
                if calls == 1:
                    raise ValueError("not yet")

            revisions = Revisions(database)
            revisions.watch("keys", callback)
            for _ in range(3):
                await revisions.look()
            assert calls == 2

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "keys could not be taken up" in caplog.text


def test_polling_sees_a_change_without_being_asked(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions_module, "POLL_SECONDS", 0.02)

    async def main() -> None:
        async with noted(database_url) as ours, noted(database_url) as theirs:
            seen = asyncio.Queue[None]()

            async def callback() -> None:
                seen.put_nowait(None)

            revisions = Revisions(ours)
            revisions.watch("keys", callback)
            revisions.start()
            await asyncio.wait_for(seen.get(), 10)
            await theirs.write(lambda connection: bump(connection, "keys"))
            await asyncio.wait_for(seen.get(), 10)
            await revisions.close()

    asyncio.run(main())


def test_a_change_that_is_rolled_back_moves_no_number(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            called: list[str] = []

            async def callback() -> None:
                called.append("keys")

            def change(connection: object) -> None:
                bump(connection, "keys")  # type: ignore[arg-type]
                raise ValueError("no")

            revisions = Revisions(database)
            revisions.watch("keys", callback)
            await revisions.look()
            with pytest.raises(ValueError, match="no"):
                await database.write(change)
            await revisions.look()
            assert len(called) == 1

    asyncio.run(main())
