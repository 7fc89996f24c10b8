"""Keys as they are kept, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import pytest
from sqlalchemy import Connection

from quickchange_server.errors import ConflictError, InvalidRequestError, NotFoundError
from quickchange_server.storage.database import Database
from quickchange_server.tenants import key_records
from quickchange_server.tenants.key import MAX_LIMIT, Key, Limits, Terms

T = TypeVar("T")

NOW = 1_700_000_000.25
FULL = Limits(1, 2, 3, MAX_LIMIT, 5)
TERMS = Terms("acme", "manage", ("acme/*", "shared-[a-z]"), "Läden, 店", FULL, expires=NOW + 0.5)
FREE = Terms("other", "infer", ("*",))


def done(url: str, *changes: Callable[[Connection], T]) -> list[T]:
    """What the changes return, each in a transaction of its own."""

    async def work() -> list[T]:
        database = await asyncio.to_thread(Database.open, url)
        try:
            return [await database.write(change) for change in changes]
        finally:
            await database.close()

    return asyncio.run(work())


def made(url: str, terms: Terms = TERMS) -> tuple[Key, str]:
    (both,) = done(url, partial(key_records.create, terms=terms, now=NOW))
    return both


def test_a_key_is_read_as_it_was_made(database_url: str) -> None:
    first, _ = made(database_url)
    second, _ = made(database_url, FREE)
    (keys,) = done(database_url, key_records.every)
    assert {key.id: key for key in keys} == {first.id: first, second.id: second}
    assert first.terms == TERMS


def test_a_changed_key_is_read_as_it_was_changed(database_url: str) -> None:
    key, secret = made(database_url)
    changed = partial(
        key_records.change,
        key_id=key.id,
        changed=lambda t: replace(t, limits=Limits(), expires=None),
    )
    done(database_url, changed)
    (found,) = done(database_url, partial(key_records.one, key_id=key.id))
    assert found == replace(key, terms=replace(TERMS, limits=Limits(), expires=None))
    assert found.accepts(secret, NOW)


def test_a_rotated_key_is_read_with_both_secrets(database_url: str) -> None:
    key, old = made(database_url)
    ((_, new),) = done(
        database_url, partial(key_records.rotate, key_id=key.id, overlap=10.5, now=NOW)
    )
    (found,) = done(database_url, partial(key_records.one, key_id=key.id))
    assert found.accepts(new, NOW)
    assert found.accepts(old, NOW + 10.25)
    assert not found.accepts(old, NOW + 10.5)


def test_a_revoked_key_is_read_as_revoked_and_takes_no_change(database_url: str) -> None:
    key, _ = made(database_url)
    revoke = partial(key_records.revoke, key_id=key.id)
    done(database_url, partial(revoke, now=NOW + 1), partial(revoke, now=NOW + 2))
    (found,) = done(database_url, partial(key_records.one, key_id=key.id))
    assert found.revoked == NOW + 1
    with pytest.raises(ConflictError, match="revoked"):
        done(database_url, partial(key_records.change, key_id=key.id, changed=lambda terms: terms))


@pytest.mark.parametrize("key_id", ["0123456789abcdef", "x", "\0", "", "é" * 500])
def test_what_is_no_key_is_not_found(database_url: str, key_id: str) -> None:
    with pytest.raises(NotFoundError):
        done(database_url, partial(key_records.one, key_id=key_id))


def test_a_label_that_postgresql_can_not_keep_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="label"):
        replace(FREE, label="a\0b")
