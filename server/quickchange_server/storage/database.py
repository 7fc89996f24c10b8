"""The server's database, for the event loop: reads on threads, changes on one writer thread.

    rows = await database.read(lambda connection: connection.execute(select(...)).all())
    number = await database.write(change)     # one transaction; after its commit
    database.record(change)                   # queued; shares a commit with what else is queued

A change gets a connection within a transaction. It may be run more than once (its transaction is
tried again where the database went away, or a neighbour failed), so all that it does is to use the
connection. It neither commits nor keeps the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.engines import READERS, make_engine, reading, unusable, writing
from quickchange_server.storage.outages import passes
from quickchange_server.storage.schema import upgrade
from quickchange_server.storage.writer import Writer, absent

T = TypeVar("T")


def check(url: str) -> None:
    """Raises what `Database.open` would; brings the tables to this version's as it does."""
    _migrated(url).dispose()


class Database:
    """One database with its threads. Its methods are called on an event loop."""

    def __init__(self, engine: Engine, metrics: StorageMetrics) -> None:
        self._engine = engine
        self._reading = reading(engine)
        self._writer = Writer(writing(engine), metrics)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="database-reader")

    @classmethod
    def open(cls, url: str, metrics: StorageMetrics | None = None) -> Database:
        """Connect, and bring the tables to this version's. Blocks.

        Raises SettingError ("database") where the URL is wrong, its driver is missing, it can't
        be reached or written, or its tables are newer than this version.
        """
        return cls(_migrated(url), metrics or StorageMetrics())

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run `query` on a reader's connection: one transaction, which sees the database at one
        moment and is rolled back.

        Raises what `query` raises, and UnavailableError where the database is away.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read, query)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in a transaction of its own, after all that was asked for before.

        Returns after the commit. Raises what `change` raises, and nothing is changed;
        UnavailableError where the database stays away.
        """
        value: T = await self._writer.submit(change, alone=True)
        return value

    def record(self, change: Callable[[Connection], None]) -> asyncio.Future[None]:
        """Queue `change` at once; the future is done after its commit, or fails with what
        `change` raised, alone. While the database is away records wait, up to a bound."""
        return self._writer.submit(change, alone=False)

    async def close(self) -> None:
        """Commit all that was asked for, and end the threads."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._readers.shutdown()
        self._engine.dispose()

    def _read(self, query: Callable[[Connection], T]) -> T:
        try:
            return self._read_once(query)
        except DBAPIError as error:
            if not passes(error):
                raise
        try:  # the pool's connections were of a server that has restarted: now they are new
            return self._read_once(query)
        except DBAPIError as error:
            if not passes(error):
                raise
            raise absent("it does not answer") from error

    def _read_once(self, query: Callable[[Connection], T]) -> T:
        with self._reading.connect() as connection:
            return query(connection)


def _migrated(url: str) -> Engine:
    engine = make_engine(url)
    try:
        upgrade(writing(engine))
    except DBAPIError as error:
        engine.dispose()
        raise unusable(engine, error) from error
    except BaseException:
        engine.dispose()
        raise
    return engine
