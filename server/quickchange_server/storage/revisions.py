"""Revision numbers by topic, polled by replicas to notice changed definitions.

A transaction that changes definitions bumps their topic, so that a replica which sees the new
number sees the change too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sqlalchemy import Connection, select

from quickchange_server.errors import UnavailableError
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables import REVISIONS, insert

POLL_SECONDS = 0.5  # what one replica changes acts on the others within a second

Callback = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


def bump(connection: Connection, topic: str) -> None:
    """Increment the topic's revision within the transaction that changes it."""
    statement = insert(connection, REVISIONS).values(topic=topic, number=1)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[REVISIONS.c.topic], set_={"number": REVISIONS.c.number + 1}
        )
    )


class Revisions:
    """Calls back when a topic's revision differs from the last one seen."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: dict[str, list[Callback]] = {}
        self._seen: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    def watch(self, topic: str, callback: Callback) -> None:
        """Await `callback` at the next poll, and then after each change of `topic`.

        An exception is logged, and the callback is called again at the next poll.
        """
        self._callbacks.setdefault(topic, []).append(callback)
        self._seen.pop(topic, None)

    def start(self) -> None:
        """Start polling every POLL_SECONDS on the running event loop."""
        self._polling = asyncio.create_task(self._poll(), name="revisions")

    async def look(self) -> None:
        """Poll now, such as before the first request. Raises what `Database.read` raises."""
        async with self._turn:  # callbacks of a topic never overlap
            numbers = await self._database.read(_numbers)
            for topic, callbacks in self._callbacks.items():
                number = numbers.get(topic, 0)
                if self._seen.get(topic) != number and await _all_succeed(topic, callbacks):
                    self._seen[topic] = number

    async def take_up(self) -> None:
        """Poll now, after this replica has committed a change, whose response must not fail.

        If the database has gone away since, the change takes effect here at a later poll.
        """
        try:
            await self.look()
        except UnavailableError as error:
            logger.warning("a change that is made acts a little later here: %s", error)

    async def close(self) -> None:
        """Stop polling."""
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
