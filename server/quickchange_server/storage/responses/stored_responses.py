"""Responses that are kept: written, read back, continued, and swept when their time is over.

A conversation is a chain of responses, each of which names the one that it continues. Continuing
renews the time of the whole chain, so that no conversation in use loses its beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from quickchange_server.errors import InvalidRequestError, NotFoundError, UnavailableError
from quickchange_server.storage.database import Database
from quickchange_server.storage.responses import tables_responses as table
from quickchange_server.storage.responses.tables_responses import Link, Owner

MOST_TURNS = 512  # responses of one conversation
SWEEP_SECONDS = 60.0

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what no database stumbles over

Json = dict[str, Any]
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """A response with the items that it was given."""

    response: Json
    input: list[Json]

    @property
    def id(self) -> str:
        return str(self.response["id"])


class Underway(Protocol):
    """A response that this server is streaming."""

    def so_far(self) -> Json:
        """The response as it is now."""

    async def cancel(self) -> Json:
        """End it. Returns the response, which is kept."""


class StoredResponses:
    """One server's way to the stored responses, on its event loop."""

    def __init__(
        self,
        database: Database,
        *,
        seconds: float,
        tenant_bytes: int,
        conversation_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`conversation_bytes`: what one request may bring back from the store."""
        self._database = database
        self._seconds = seconds
        self._tenant_bytes = tenant_bytes
        self._conversation_bytes = conversation_bytes
        self._clock = clock
        self._underway: dict[tuple[Owner, str], Underway] = {}
        self._unswept = 0  # bytes written here since the last sweep
        self._full = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep every SWEEP_SECONDS, and sooner where much is written."""
        self._sweeping = asyncio.create_task(self._sweep_on(), name="stored-responses")

    async def close(self) -> None:
        """Stop sweeping."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])

    def begin(self, owner: Owner, id: str, underway: Underway) -> None:
        """Note a response that begins; `end` takes it out."""
        self._underway[owner, id] = underway

    def end(self, owner: Owner, id: str) -> None:
        self._underway.pop((owner, id), None)

    def running(self, owner: Owner, id: str) -> Underway | None:
        """The response, if this server is streaming it."""
        return self._underway.get((owner, id))

    async def keep(self, owner: Owner, kept: Kept, *, continued: Sequence[str]) -> None:
        """Write a response that continues others, the nearest first. Returns after the commit.

        Raises UnavailableError or StorageFullError.
        """
        document = json.dumps({"response": kept.response, "input": kept.input})
        link = Link(
            kept.id,
            continued[0] if continued else None,
            len(document) + table.OVERHEAD_BYTES,
        )
        expires = self._clock() + self._seconds
        await self._database.write(
            lambda connection: table.write(
                connection, owner, link, document, continued=continued, expires=expires
            )
        )
        self._unswept += link.bytes
        if self._unswept > self._tenant_bytes // 8:
            self._full.set()

    async def find(self, owner: Owner, id: str) -> Kept | None:
        """The response; None where the owner has none of this id."""
        if _ID.fullmatch(id) is None:
            return None
        found = await self._read(lambda connection, now: self._kept(connection, owner, [id], now))
        return found.get(id)

    async def several(self, owner: Owner, ids: Sequence[str], param: str) -> dict[str, Kept]:
        """Those of the responses that are there. Raises InvalidRequestError, of the field `param`,
        if they are too large together."""

        def read(connection: Connection, now: float) -> dict[str, Kept]:
            self._check_size(table.sizes(connection, owner, ids, now=now), param)
            return self._kept(connection, owner, ids, now)

        return await self._read(read)

    async def conversation(self, owner: Owner, last: str, param: str | None = None) -> list[Kept]:
        """A response and those that it continues, the first first.

        Raises NotFoundError if the response, or one before it, is not there, and
        InvalidRequestError if the conversation is too long; both of the field `param`.
        """

        if _ID.fullmatch(last) is None:
            raise unknown(last, param)

        def read(connection: Connection, now: float) -> list[Kept]:
            links = table.chain(connection, owner, last, most=MOST_TURNS + 1, now=now)
            if not links:
                raise unknown(last, param)
            if len(links) > MOST_TURNS:
                raise InvalidRequestError(
                    f"{_place(param)}this conversation has more than {MOST_TURNS} responses; begin "
                    "a new one with what is still needed of it in input",
                    param=param,
                )
            if (missing := links[-1].previous) is not None:
                raise NotFoundError(
                    f"{_place(param)}the conversation's response {missing!r} was deleted; send "
                    "the conversation in input",
                    param=param,
                )
            self._check_size(links, param)
            ids = [link.id for link in reversed(links)]
            found = self._kept(connection, owner, ids, now)
            return [found[id] for id in ids]

        return await self._read(read)

    async def forget(self, owner: Owner, id: str) -> bool:
        """Delete a response; False where the owner has none of this id."""
        now = self._clock()
        return _ID.fullmatch(id) is not None and await self._database.write(
            lambda connection: table.remove(connection, owner, id, now=now)
        )

    async def sweep(self) -> None:
        """Delete what has expired, and the oldest of tenants that have too much."""
        self._unswept = 0
        now = self._clock()
        while await self._database.write(lambda c: table.sweep_expired(c, now)):
            pass
        over = await self._database.read(lambda c: table.crowded(c, self._tenant_bytes))
        for tenant, excess in over.items():
            left = excess
            while left > 0:
                freed = await self._database.write(
                    lambda c, t=tenant, e=left: table.sweep_oldest(c, t, e)  # type: ignore[misc]
                )
                if not freed:
                    break
                left -= freed

    async def _sweep_on(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), SWEEP_SECONDS)
            self._full.clear()
            try:
                await self.sweep()
            except UnavailableError as error:
                logger.warning("stored responses are swept later: %s", error)
            except Exception:
                logger.exception("stored responses could not be swept")

    async def _read(self, query: Callable[[Connection, float], T]) -> T:
        now = self._clock()
        return await self._database.read(lambda connection: query(connection, now))

    def _kept(
        self, connection: Connection, owner: Owner, ids: Sequence[str], now: float
    ) -> dict[str, Kept]:
        found = table.documents(connection, owner, ids, now=now)
        return {id: Kept(**json.loads(document)) for id, document in found.items()}

    def _check_size(self, links: Sequence[Link], param: str | None) -> None:
        size = sum(link.bytes for link in links)
        if size > self._conversation_bytes:
            raise InvalidRequestError(
                f"{_place(param)}what is stored of this conversation takes {size} bytes, of "
                f"{self._conversation_bytes} at most (the setting max_request_bytes); begin a new "
                "one with what is still needed of it in input",
                param=param,
            )


def unknown(id: str, param: str | None = None) -> NotFoundError:
    """The error for an id that the owner has no response of."""
    return NotFoundError(f"{_place(param)}Response with id {id!r} not found.", param=param)


def _place(param: str | None) -> str:
    return "" if param is None else f"{param}: "
