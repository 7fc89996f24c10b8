"""Authentication of API keys, in memory, so that no request queries the database.

Replicas reload the keys when their revision changes. While the database can't be reached, the keys
loaded last stay valid: expiry still takes effect, a revocation by another replica only later.
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
    """All keys, by public id. Used on the event loop only."""

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
        """Load the keys. Raises what `Database.read` raises, and then keeps the old keys."""
        async with self._turn:  # an older snapshot never replaces a later one
            keys = await self._database.read(every)
            self._entries = {key.id: _Entry(key, self._caller(key)) for key in keys}

    def caller(self, secret: str | None) -> Caller:
        """The caller that a secret authenticates. Raises UnauthenticatedError."""
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
        """The key with this public id. Raises UnauthenticatedError if it is not valid."""
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
