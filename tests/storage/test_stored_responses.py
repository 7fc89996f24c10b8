"""The store of responses: chains, expiry, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from quickchange_server.errors import InvalidRequestError, NotFoundError
from quickchange_server.storage.database import Database
from quickchange_server.storage.responses import stored_responses, tables_responses
from quickchange_server.storage.responses.stored_responses import Kept, StoredResponses
from quickchange_server.storage.responses.tables_responses import Owner

OWNER = Owner("acme", "k1")
DAY = 86_400.0


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def with_store(
    url: str,
    work: Callable[[StoredResponses, Clock], Awaitable[None]],
    tenant_bytes: int = 1 << 20,
    conversation_bytes: int = 1 << 20,
) -> None:
    async def run() -> None:
        database, clock = Database.open(url), Clock()
        store = StoredResponses(
            database,
            seconds=DAY,
            tenant_bytes=tenant_bytes,
            conversation_bytes=conversation_bytes,
            clock=clock,
        )
        try:
            await work(store, clock)
        finally:
            await database.close()

    asyncio.run(run())


def kept(id: str, text: str = "") -> Kept:
    return Kept({"id": id, "text": text}, [{"of": id}])


async def chained(store: StoredResponses, *ids: str) -> None:
    for index, id in enumerate(ids):
        await store.keep(OWNER, kept(id), continued=list(reversed(ids[:index])))


def test_a_conversation_is_read_from_its_first_response_on(database_url: str) -> None:
    async def work(store: StoredResponses, _clock: Clock) -> None:
        await chained(store, "a", "b", "c")
        assert await store.conversation(OWNER, "c", "p") == [kept("a"), kept("b"), kept("c")]
        assert await store.conversation(OWNER, "b", "p") == [kept("a"), kept("b")]

    with_store(database_url, work)


def test_a_response_is_its_owners_alone(database_url: str) -> None:
    async def work(store: StoredResponses, _clock: Clock) -> None:
        await chained(store, "a")
        for other in (Owner("acme", "k2"), Owner("other", "k1")):
            assert await store.find(other, "a") is None
            assert not await store.forget(other, "a")
            assert await store.several(other, ["a"], "p") == {}
            with pytest.raises(NotFoundError):
                await store.conversation(other, "a", "p")
        assert await store.find(OWNER, "a") == kept("a")

    with_store(database_url, work)


def test_a_response_is_gone_when_its_time_is_over(database_url: str) -> None:
    async def work(store: StoredResponses, clock: Clock) -> None:
        await chained(store, "a")
        clock.now += DAY - 1
        assert await store.find(OWNER, "a") is not None
        clock.now += 1
        assert await store.find(OWNER, "a") is None  # before it is swept
        await store.sweep()
        clock.now -= DAY
        assert await store.find(OWNER, "a") is None

    with_store(database_url, work)


def test_a_conversation_in_use_keeps_its_beginning(database_url: str) -> None:
    async def work(store: StoredResponses, clock: Clock) -> None:
        await chained(store, "a", "b")
        clock.now += DAY - 1
        await store.keep(OWNER, kept("c"), continued=["b", "a"])
        clock.now += DAY - 1
        await store.sweep()
        assert len(await store.conversation(OWNER, "c", "p")) == 3

    with_store(database_url, work)


def test_a_tenants_oldest_go_beyond_its_bytes(database_url: str) -> None:
    async def work(store: StoredResponses, clock: Clock) -> None:
        other = Owner("other", "")
        await store.keep(other, kept("o"), continued=[])
        for number in range(20):
            clock.now += 1
            await store.keep(OWNER, kept(f"r{number}", "x" * 1000), continued=[])
        await store.sweep()
        left = [number for number in range(20) if await store.find(OWNER, f"r{number}")]
        assert left == list(range(20 - len(left), 20))
        assert len(left) == 6  # of about 1,550 bytes each
        assert await store.find(other, "o") is not None

    with_store(database_url, work, tenant_bytes=10_000)


def test_a_sweep_goes_on_until_all_that_has_expired_is_gone(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_responses, "SWEPT_AT_ONCE", 3)

    async def work(store: StoredResponses, clock: Clock) -> None:
        ids = [f"r{number}" for number in range(10)]
        for id in ids:
            await store.keep(OWNER, kept(id), continued=[])
        clock.now += DAY
        await store.sweep()
        clock.now -= DAY
        assert await store.several(OWNER, ids, "p") == {}

    with_store(database_url, work)


def test_a_conversation_that_is_too_long_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_responses, "MOST_TURNS", 3)

    async def work(store: StoredResponses, _clock: Clock) -> None:
        await chained(store, "a", "b", "c", "d")
        assert len(await store.conversation(OWNER, "c", "p")) == 3
        with pytest.raises(InvalidRequestError, match=r"p: .*more than 3 responses"):
            await store.conversation(OWNER, "d", "p")

    with_store(database_url, work)


def test_a_conversation_that_is_too_large_is_refused(database_url: str) -> None:
    async def work(store: StoredResponses, _clock: Clock) -> None:
        await chained(store, "a", "b", "c")
        assert len(await store.conversation(OWNER, "b", "p")) == 2
        with pytest.raises(InvalidRequestError, match=r"p: .*max_request_bytes"):
            await store.conversation(OWNER, "c", "p")
        with pytest.raises(InvalidRequestError, match=r"p: .*max_request_bytes"):
            await store.several(OWNER, ["a", "b", "c"], "p")

    with_store(database_url, work, conversation_bytes=1_300)


def test_what_a_write_is_answered_with_is_there_after_a_second_one_of_the_same(
    database_url: str,
) -> None:
    async def work(store: StoredResponses, _clock: Clock) -> None:
        await store.keep(OWNER, kept("a"), continued=[])
        await store.keep(OWNER, kept("a", "again"), continued=[])  # a commit's answer was lost
        assert await store.find(OWNER, "a") == kept("a")

    with_store(database_url, work)
