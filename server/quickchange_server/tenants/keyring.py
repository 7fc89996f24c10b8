"""The keys as requests are checked against them: in memory, so that no request asks the database.

Replicas read the keys again when their revision changes. While the database can't be reached, the
keys that were read last go on: expiry still acts, revocations elsewhere act when it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from quickchange_server.errors import UnauthenticatedError
from quickchange_server.frontend.caller import Caller
from quickchange_server.storage.database import Database
from quickchange_server.tenants.key import Key
from quickchange_server.tenants.key_records import every
from quickchange_server.tenants.key_secret import id_of

_HOW = "send `Authorization: Bearer KEY` with a valid API key"


@dataclass(frozen=True, slots=True)
class _Entry:
    key: Key
    caller: Caller


class Keyring:
    """All keys by public id. On the event loop alone."""

    def __init__(
        self, database: Database, *, salted: bool, clock: Callable[[], float] = time.time
    ) -> None:
        """`salted`: tenants share no prefix-cache hits. `clock` gives Unix seconds."""
        self._database = database
        self._salted = salted
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._turn = asyncio.Lock()

    async def refresh(self) -> None:
        """Take what the database holds. Raises what reading raises; the keys stay as they were."""
        async with self._turn:  # a snapshot never takes the place of a later one
            keys = await self._database.read(every)
            self._entries = {key.id: _Entry(key, self._caller(key)) for key in keys}

    def caller(self, secret: str | None) -> Caller:
        """Whose secret this is. Raises UnauthenticatedError."""
        if secret is None:
            raise UnauthenticatedError(f"this server asks for an API key; {_HOW}")
        entry = self._entries.get(id_of(secret) or "")
        now = self._clock()
        if entry is None or not entry.key.accepts(secret, now):
            raise UnauthenticatedError(f"the API key is not valid; {_HOW}")
        state = entry.key.state(now)
        if state != "valid":
            raise UnauthenticatedError(f"the API key is {state}; {_HOW}")
        return entry.caller

    def key(self, key_id: str) -> Key:
        """The valid key with this public id. Raises UnauthenticatedError where it has ended."""
        entry = self._entries.get(key_id)
        if entry is None or entry.key.state(self._clock()) != "valid":
            raise UnauthenticatedError(f"the API key has ended; {_HOW}")
        return entry.key

    def _caller(self, key: Key) -> Caller:
        terms = key.terms
        return Caller(
            tenant=terms.tenant,
            key=key.id,
            scope=terms.scope,
            names=terms.names,
            salt=terms.tenant if self._salted else "",
            max_new_tokens=terms.limits.max_new_tokens,
        )
