"""The server's database, used from the event loop: reads on threads, changes on a writer thread.

    rows = await database.read(lambda connection: connection.execute(select(...)).all())
    number = await database.write(change)     # a transaction of its own; returns after the commit
    database.record(change)                   # queued; shares a commit with other records

A change gets a connection within a transaction. It may run more than once (its transaction is
retried if the database went away or another change in it failed), so it has no effect other than
through the connection, and neither commits nor keeps it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.database_engines import (
    READERS,
    make_engine,
    reading,
    unusable,
    writing,
)
from quickchange_server.storage.outages import passes
from quickchange_server.storage.schema import upgrade
from quickchange_server.storage.writer import Writer, unanswered

T = TypeVar("T")


def check(url: str, *, create: bool = True) -> None:
    """Migrate the database's tables. Raises what `Database.open` would."""
    _migrated(url, create=create).dispose()


class Database:
    """One database and its threads. Methods are called on an event loop."""

    def __init__(self, engine: Engine, metrics: StorageMetrics) -> None:
        self._engine = engine
        self._reading = reading(engine)
        self._writer = Writer(writing(engine), metrics)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="database-reader")

    @classmethod
    def open(
        cls, url: str, metrics: StorageMetrics | None = None, *, create: bool = True
    ) -> Database:
        """Connect and migrate the tables to this version. Blocks.

        Raises SettingError ("database") if the URL is wrong, its driver is missing, the database
        can't be reached or written, its tables are newer than this version, or, without `create`,
        there are none.
        """
        return cls(_migrated(url, create=create), metrics or StorageMetrics())

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run `query` on a reader's connection, in a transaction that sees one snapshot and is
        rolled back.

        Raises what `query` raises, and UnavailableError if the database can't be reached.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read, query)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in a transaction of its own, after all changes submitted before.

        Returns after the commit. Raises what `change` raises, then nothing is changed, and
        UnavailableError if the database stays unreachable.
        """
        value: T = await self._writer.submit(change, alone=True)
        return value

    def record(self, change: Callable[[Connection], None]) -> asyncio.Future[None]:
        """Queue `change`. The future is done after its commit, or fails with what `change` raised,
        which affects no other change. While the database is unreachable, records wait, up to a
        bound."""
        return self._writer.submit(change, alone=False)

    async def close(self) -> None:
        """Commit all submitted changes and end the threads."""
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
        try:  # the pooled connections were to a server that has restarted; these are new
            return self._read_once(query)
        except DBAPIError as error:
            if not passes(error):
                raise
            raise unanswered(error) from error

    def _read_once(self, query: Callable[[Connection], T]) -> T:
        with self._reading.connect() as connection:
            return query(connection)


def _migrated(url: str, *, create: bool) -> Engine:
    engine = make_engine(url, create=create)
    try:
        upgrade(writing(engine), create=create)
    except DBAPIError as error:
        engine.dispose()
        raise unusable(engine, error) from error
    except BaseException:
        engine.dispose()
        raise
    return engine
