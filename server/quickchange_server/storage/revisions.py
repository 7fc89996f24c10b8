"""Tells replicas that definitions have changed: a number by topic, polled.

Whoever changes definitions bumps their topic in the same transaction, so that a replica that sees
the number sees the change too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sqlalchemy import Connection, select

from quickchange_server.errors import UnavailableError
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables import REVISIONS, insert

POLL_SECONDS = 1.0

Callback = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


def bump(connection: Connection, topic: str) -> None:
    """Count one more change of `topic`, within the transaction that makes it."""
    statement = insert(connection, REVISIONS).values(topic=topic, number=1)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[REVISIONS.c.topic], set_={"number": REVISIONS.c.number + 1}
        )
    )


class Revisions:
    """Calls back where a topic's number is another than the last one seen."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: dict[str, list[Callback]] = {}
        self._seen: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    def watch(self, topic: str, callback: Callback) -> None:
        """Await `callback` at the next look, and then after each change of `topic`.

        What it raises is logged, and it is called again at the next look.
        """
        self._callbacks.setdefault(topic, []).append(callback)
        self._seen.pop(topic, None)

    def start(self) -> None:
        """Begin to look every POLL_SECONDS, on the running event loop."""
        self._polling = asyncio.create_task(self._poll(), name="revisions")

    async def look(self) -> None:
        """Look now: to load before the first request.

        Raises what `Database.read` raises.
        """
        async with self._turn:  # one at a time: callbacks of a topic never overlap
            numbers = await self._database.read(_numbers)
            for topic, callbacks in self._callbacks.items():
                number = numbers.get(topic, 0)
                if self._seen.get(topic) != number and await _all_succeed(topic, callbacks):
                    self._seen[topic] = number

    async def take_up(self) -> None:
        """Look now, after a change of one's own that is committed: its answer must not fail any
        more. Where the database has gone away since, the change acts at a later look."""
        try:
            await self.look()
        except UnavailableError as error:
            logger.warning("a change that is made acts a little later here: %s", error)

    async def close(self) -> None:
        """Look no more."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])

    async def _poll(self) -> None:
        away = False
        while True:
            try:
                await self.look()
                away = False
            except Exception as error:
                if not away:
                    logger.warning("changes by other replicas can't be seen: %s", error)
                away = True
            await asyncio.sleep(POLL_SECONDS)


def _numbers(connection: Connection) -> dict[str, int]:
    return {row.topic: row.number for row in connection.execute(select(REVISIONS))}


async def _all_succeed(topic: str, callbacks: list[Callback]) -> bool:
    succeeded = True
    for callback in callbacks:
        try:
            await callback()
        except Exception:
            logger.exception("changed %s could not be taken up", topic)
            succeeded = False
    return succeeded
