"""Reads, writes and records: what is committed when, and who is told what."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import IntegrityError
from storage_support import note, noted, notes, notes_at

from quickchange_server.errors import UnavailableError


def test_what_is_written_is_there_for_others_when_write_returns(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            await database.write(note("one"))
            assert notes_at(database_url) == ["one"]
            assert await database.read(notes) == ["one"]

    asyncio.run(main())


def test_write_returns_what_the_change_returns(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            assert await database.write(lambda _: 17) == 17

    asyncio.run(main())


def test_a_write_that_raises_changes_nothing(database_url: str) -> None:
    def change(connection: Connection) -> None:
        note("half")(connection)
        raise KeyError("of the change")

    async def main() -> None:
        async with noted(database_url) as database:
            with pytest.raises(KeyError, match="of the change"):
                await database.write(change)
            assert await database.read(notes) == []

    asyncio.run(main())


def test_records_are_there_for_others_when_their_futures_are_done(database_url: str) -> None:
    texts = [f"n{number}" for number in range(300)]

    async def main() -> None:
        async with noted(database_url) as database:
            futures = [database.record(note(text)) for text in texts]
            await futures[0]
            assert notes_at(database_url)[:1] == texts[:1]
            await asyncio.gather(*futures)
            assert notes_at(database_url) == texts

    asyncio.run(main())


def test_a_record_that_fails_harms_no_other_and_gets_its_own_error(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            futures = [database.record(note(text)) for text in ("a", "b", "a", "c", "b", "d")]
            results = await asyncio.gather(*futures, return_exceptions=True)
            failed = [isinstance(result, IntegrityError) for result in results]
            assert failed == [False, False, True, False, True, False]
            assert await database.read(notes) == ["a", "b", "c", "d"]

    asyncio.run(main())


def test_a_record_that_hides_its_own_error_cannot_undo_its_neighbours(database_url: str) -> None:
    def hides(connection: Connection) -> None:
        try:
            note("a")(connection)
        except IntegrityError:
            return

    async def main() -> None:
        async with noted(database_url) as database:
            await database.write(note("a"))
            futures = [database.record(change) for change in (note("b"), hides, note("c"), hides)]
            results = await asyncio.gather(*futures, return_exceptions=True)
            assert (results[0], results[2]) == (None, None)
            assert await database.read(notes) == ["a", "b", "c"]

    asyncio.run(main())


def test_a_change_that_raises_stop_iteration_fails_its_future(database_url: str) -> None:
    def change(_: Connection) -> None:
        next(iter(()))

    async def main() -> None:
        async with noted(database_url) as database:
            with pytest.raises(RuntimeError, match="StopIteration"):
                await database.record(change)
            await database.write(note("still alive"))

    asyncio.run(main())


def test_a_read_changes_nothing(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            await database.read(note("read"))
            assert await database.read(notes) == []

    asyncio.run(main())


def test_a_read_sees_the_database_at_one_moment(database_url: str) -> None:
    async def run() -> None:
        async with noted(database_url) as database:
            await database.write(note("before"))
            engine = create_engine(database_url)

            def twice(connection: Connection) -> tuple[list[str], list[str]]:
                first = notes(connection)
                with engine.begin() as other:
                    note("meanwhile")(other)
                return first, notes(connection)

            assert await database.read(twice) == (["before"], ["before"])
            assert await database.read(notes) == ["before", "meanwhile"]
            engine.dispose()

    asyncio.run(run())


def test_closing_commits_what_was_recorded(database_url: str) -> None:
    texts = [f"n{number}" for number in range(1000)]

    async def main() -> None:
        async with noted(database_url) as database:
            for text in texts:
                database.record(note(text))

    asyncio.run(main())
    assert notes_at(database_url) == texts


def test_what_is_asked_for_after_closing_fails(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            pass
        with pytest.raises(UnavailableError, match="closed"):
            await database.record(note("late"))

    asyncio.run(main())


def test_a_cancelled_wait_loses_no_record(database_url: str) -> None:
    async def main() -> None:
        async with noted(database_url) as database:
            database.record(note("a")).cancel()
            await database.write(note("b"))
            assert await database.read(notes) == ["a", "b"]

    asyncio.run(main())
