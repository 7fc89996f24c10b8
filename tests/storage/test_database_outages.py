"""While PostgreSQL is away changes wait, up to a bound; a lost answer makes nothing twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from postgres_server import PostgresServer, postgres_server
from prometheus_client import CollectorRegistry
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError, OperationalError
from storage_support import NOTES, note, noted, notes

from quickchange_server.errors import UnavailableError
from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage import transactions as transactions_module
from quickchange_server.storage import writer as writer_module
from quickchange_server.storage.database import Database
from quickchange_server.storage.database_engines import make_engine, writing
from quickchange_server.storage.outages import StillRunningError, passes
from quickchange_server.storage.transactions import Change, Transactions


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """A server that the tests stop and start."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def url(own_postgres: PostgresServer) -> Iterator[str]:
    yield own_postgres.make_database()
    own_postgres.start_again()


def test_records_wait_for_a_server_that_restarts(own_postgres: PostgresServer, url: str) -> None:
    async def main() -> None:
        async with noted(url) as database:
            await database.write(note("before"))
            own_postgres.stop()
            records = [database.record(note(f"during {number}")) for number in range(3)]
            write = asyncio.ensure_future(database.write(note("after")))
            await asyncio.sleep(0.3)
            assert not any(future.done() for future in (*records, write))
            own_postgres.start()
            await asyncio.gather(*records, write)
            assert await database.read(notes) == [
                "before", "during 0", "during 1", "during 2", "after",
            ]  # fmt: skip

    asyncio.run(main())


def test_a_write_gives_up_and_says_when_to_try_again(
    own_postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "WRITE_SECONDS", 0.2)

    async def main() -> None:
        async with noted(url) as database:
            own_postgres.stop()
            record = database.record(note("waits on"))
            for _ in range(2):  # behind the record, then alone
                with pytest.raises(UnavailableError, match="can't be reached") as raised:
                    await database.write(note("given up"))
                assert raised.value.retry_after is not None
            own_postgres.start()
            await record
            assert await database.read(notes) == ["waits on"]

    asyncio.run(main())


def test_a_read_of_a_server_that_restarted_succeeds_and_of_one_that_is_away_says_so(
    own_postgres: PostgresServer, url: str
) -> None:
    async def main() -> None:
        async with noted(url) as database:
            assert await database.read(notes) == []
            own_postgres.stop()
            with pytest.raises(UnavailableError, match="can't be reached"):
                await database.read(notes)
            own_postgres.start()
            assert await database.read(notes) == []

    asyncio.run(main())


def counted_lost(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("quickchange_storage_lost_total")


def test_records_beyond_the_bound_fail_and_are_counted(
    own_postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_LIMIT", 5)
    registry = CollectorRegistry()

    async def main() -> None:
        database = await asyncio.to_thread(Database.open, url, StorageMetrics(registry))
        await database.write(NOTES.metadata.create_all)
        own_postgres.stop()
        records = [database.record(note(f"n{number}")) for number in range(8)]
        assert registry.get_sample_value("quickchange_storage_queue") == 5
        with pytest.raises(UnavailableError, match="too many"):
            await database.write(note("an admin's"))
        assert counted_lost(registry) == 3
        own_postgres.start()
        results = await asyncio.gather(*records, return_exceptions=True)
        assert [isinstance(result, UnavailableError) for result in results] == [False] * 5 + [
            True
        ] * 3
        assert await database.read(notes) == [f"n{number}" for number in range(5)]
        assert registry.get_sample_value("quickchange_storage_queue") == 0
        await database.close()

    asyncio.run(main())


def test_closing_gives_up_after_its_time_and_counts_what_is_lost(
    own_postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CLOSE_SECONDS", 0.2)
    registry = CollectorRegistry()

    async def main() -> None:
        database = await asyncio.to_thread(Database.open, url, StorageMetrics(registry))
        own_postgres.stop()
        records = [database.record(note(f"n{number}")) for number in range(3)]
        await database.close()
        results = await asyncio.gather(*records, return_exceptions=True)
        assert all(isinstance(result, UnavailableError) for result in results)
        assert counted_lost(registry) == 3

    asyncio.run(main())


def test_a_connection_that_breaks_beside_a_failing_record_harms_no_other(
    postgres_url: str,
) -> None:
    runs = 0

    def breaks(connection: Connection) -> None:
        """Break in the second run, which comes since a neighbour failed in the first."""
        nonlocal runs
        runs += 1
        if runs == 2:
            cut(postgres_url, connection.connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
        note("broke")(connection)

    async def main() -> None:
        async with noted(postgres_url) as database:
            held = threading.Event()
            first = database.record(lambda _: wait(held))  # so that the others share a group
            changes = (note("a"), breaks, note("a"), note("b"))
            records = [database.record(change) for change in changes]
            held.set()
            results = await asyncio.gather(first, *records, return_exceptions=True)
            failed = [isinstance(result, IntegrityError) for result in results]
            assert failed == [False, False, False, True, False]
            assert await database.read(notes) == ["a", "broke", "b"]

    asyncio.run(main())
    assert runs >= 3


def wait(event: threading.Event) -> None:
    assert event.wait(10)


# --- a commit whose answer is lost --------------------------------------------------------------


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    engine = make_engine(postgres_url)
    NOTES.metadata.create_all(engine)
    yield engine
    engine.dispose()


def lose_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, made: bool) -> None:
    """Let the next commit's connection be cut by the server, after it is `made` or before."""
    commit = engine.dialect.do_commit
    url = engine.url.render_as_string(hide_password=False)

    def do_commit(connection: Any) -> None:
        monkeypatch.setattr(engine.dialect, "do_commit", commit)
        if made:
            commit(connection)
        cut(url, connection.driver_connection.info.backend_pid)
        connection.driver_connection.execute("SELECT 1")
        commit(connection)

    monkeypatch.setattr(engine.dialect, "do_commit", do_commit)


def cut(url: str, pid: int) -> None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))


def failure(transactions: Transactions, changes: list[Change]) -> BaseException:
    with pytest.raises((OperationalError, StillRunningError)) as raised:
        transactions.commit(changes)
    return raised.value


def test_a_commit_that_was_made_without_an_answer_is_not_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(connection: Connection) -> int:
        note("once")(connection)
        return 17

    transactions = Transactions(writing(engine))
    lose_answer(engine, monkeypatch, made=True)
    assert passes(failure(transactions, [change]))
    assert [outcome.value for outcome in transactions.commit([change])] == [17]
    with engine.connect() as connection:
        assert notes(connection) == ["once"]


def test_a_commit_that_was_not_made_is_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions = Transactions(writing(engine))
    lose_answer(engine, monkeypatch, made=False)
    assert passes(failure(transactions, [note("a"), note("b")]))
    transactions.commit([note("a"), note("b")])
    with engine.connect() as connection:
        assert notes(connection) == ["a", "b"]


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_that_has_not_ended_is_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    transactions = Transactions(writing(engine))
    with engine.connect() as other:  # what the lost connection would still be doing
        note("other")(other)
        number = other.execute(text("SELECT CAST(pg_current_xact_id() AS text)")).scalar_one()
        with monkeypatch.context() as patched:
            patched.setattr(transactions_module, "_transaction_id", lambda _: number)
            lose_answer(engine, patched, made=False)
            failure(transactions, [note("a")])
        assert isinstance(failure(transactions, [note("a")]), StillRunningError)
        other.commit() if committed else other.rollback()
    transactions.commit([note("a")])
    with engine.connect() as connection:
        assert notes(connection) == (["other"] if committed else ["a"])
