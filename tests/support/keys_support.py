"""Servers that ask for API keys, and keys made straight in their database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from http_support import LIMIT_SECONDS, Live, live_server
from sqlalchemy import Connection

from quickchange_server.config import default_database
from quickchange_server.frontend.caller import Scope
from quickchange_server.storage.database import Database
from quickchange_server.tenants import key_records
from quickchange_server.tenants.key import Key, Limits, Terms

T = TypeVar("T")

COMPLETION = {"model": "tiny/base", "prompt": "Hello", "seed": 1, "max_tokens": 4}


def in_database(store: Path, change: Callable[[Connection], T]) -> T:
    """What another process does to the database in the store's folder."""

    async def work() -> T:
        database = Database.open(default_database(str(store)))
        try:
            return await database.write(change)
        finally:
            await database.close()

    return asyncio.run(work())


def make_key(
    store: Path,
    tenant: str = "acme",
    scope: Scope = "infer",
    names: tuple[str, ...] = ("*",),
    **limits: int,
) -> tuple[Key, str]:
    """A new key and its secret. `limits` are fields of Limits, or `expires`."""
    expires = limits.pop("expires", None)
    terms = Terms(tenant, scope, names, limits=Limits(**limits), expires=expires)
    return in_database(store, partial(key_records.create, terms=terms, now=time.time()))


@contextmanager
def keyed_server(store: Path, **changes: Any) -> Iterator[Live]:
    """A server that asks for keys; its client brings an admin's."""
    _, secret = make_key(store, "operator", "admin")
    with live_server(store, api_keys=True, **changes) as live:
        live.http.headers.update(bearer(secret))
        yield live


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def client_of(live: Live, secret: str | None) -> Iterator[httpx.Client]:
    """A client with this key."""
    headers = {} if secret is None else bearer(secret)
    with httpx.Client(base_url=live.url, timeout=LIMIT_SECONDS, headers=headers) as client:
        yield client


def created(live: Live, **body: Any) -> tuple[str, str]:
    """A key made over HTTP by the live client: its id and its secret."""
    response = live.post("/v1/keys", {"tenant": "acme", "names": ["*"], **body})
    assert response.status_code == 201, response.text
    return response.json()["id"], response.json()["secret"]
