"""Recordings in the database: bounds, owners, what ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_observers import Opened
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_server.storage.database import Database
from quickchange_server.storage.recordings import tables_recordings as table
from quickchange_server.storage.recordings.recorder import Recorder, RecordingLimits
from quickchange_server.storage.recordings.tables_recordings import (
    OVERHEAD_BYTES,
    RecordedRequest,
    Recording,
)
from quickchange_server.storage.revisions import Revisions
from quickchange_server.storage.tables import all_tables

MINE, THEIRS = Recording("acme", "sql"), Recording("globex", "sql")
PLENTY = RecordingLimits(requests=100, bytes=1 << 20, seconds=0.0)
SAMPLING = SamplingParams(max_tokens=4)


@dataclass
class Place:
    """A recorder with a clock, over a store of these names and digests."""

    database: Database
    recorder: Recorder
    revisions: Revisions
    now: float = 100.0
    names: set[str] = field(default_factory=lambda: {"sql"})
    digests: set[str] = field(default_factory=lambda: {"d1", "d2"})

    def ask(
        self,
        number: int,
        recording: Recording = MINE,
        *,
        digest: str = "d1",
        **changes: Any,
    ) -> bool:
        """A request of two tokens, answered with three; true if it is recorded."""
        caller = Caller(recording.tenant, "key", "infer")
        name = recording.adapter
        opened = Opened(f"r{number}", caller, name, name, 2, 4, 1, 0.0, digests=(digest,))
        given = {"adapters": (Component(digest),), "seed": 0, **changes}
        record = self.recorder.begin(opened, Submit("r", (number, 7), SAMPLING, **given))
        if record is None:
            return False
        record.add((1,))
        record.add((2, 3))
        record.keep()
        return True

    async def prompts(self, recording: Recording = MINE) -> list[int]:
        return [request.prompt[0] for request in await self.kept(recording)]

    async def kept(self, recording: Recording = MINE) -> list[RecordedRequest]:
        await self.database.write(lambda _connection: None)  # after the records before it
        return await self.recorder.requests(recording)


def placed(
    url: str, work: Callable[[Place], Awaitable[None]], limits: RecordingLimits = PLENTY
) -> None:
    async def run() -> None:
        database = Database.open(url)
        revisions = Revisions(database)
        recorder = Recorder(
            database,
            revisions,
            limits,
            "tiny",
            lambda: (place.names, place.digests),
            lambda: place.now,
        )
        place = Place(database, recorder, revisions)
        try:
            await revisions.look()
            await work(place)
        finally:
            await database.close()

    asyncio.run(run())


def test_nothing_is_recorded_before_it_is_asked_for(database_url: str) -> None:
    async def work(place: Place) -> None:
        assert not place.ask(1)
        await place.recorder.switch_on(MINE)
        assert place.ask(2)
        assert await place.prompts() == [2]

    placed(database_url, work)


def test_a_request_is_kept_as_token_ids_with_what_answered_it(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        place.ask(2**31 + 5)
        (kept,) = await place.kept()
        assert (kept.digest, kept.base) == ("d1", "tiny")
        assert (kept.prompt, kept.output) == ((2**31 + 5, 7), (1, 2, 3))

    placed(database_url, work)


def test_only_the_tenant_that_asked_is_recorded(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        assert not place.ask(1, THEIRS)
        assert place.ask(2)
        assert await place.prompts(THEIRS) == []
        assert await place.prompts() == [2]
        assert await place.recorder.states("globex") == []
        (state,) = await place.recorder.states("acme")
        assert (state.recording, state.requests) == (MINE, 1)
        assert state.bytes == 5 * 4 + OVERHEAD_BYTES

    placed(database_url, work)


def test_requests_that_others_must_not_see_or_that_mix_adapters_are_left_out(
    database_url: str,
) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        assert not place.ask(1, cache_salt="mine")
        assert not place.ask(2, background=True)
        assert not place.ask(3, pooling="mean")
        assert not place.ask(4, adapters=(Component("d1", 0.5),))
        assert not place.ask(7, adapters=(Component("d1", begin=3),))
        assert not place.ask(8, adapters=(Component("d1", end=3),))
        assert not place.ask(5, adapters=(Component("d1"), Component("d2")))
        assert not place.ask(6, adapters=())

    placed(database_url, work)


def test_a_burst_gives_one_request_and_a_day_gives_one_a_while(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        assert sum(place.ask(number) for number in range(50)) == 1
        taken = 0
        for number in range(40):
            place.now += 0.5
            taken += place.ask(100 + number)
        assert taken == 10

    placed(database_url, work, RecordingLimits(100, 1 << 20, 2.0))


def test_the_oldest_leave_when_there_are_too_many(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        await place.recorder.switch_on(THEIRS)
        place.ask(99, THEIRS)
        for number in range(7):
            place.ask(number)
        assert await place.prompts() == [4, 5, 6]
        assert await place.prompts(THEIRS) == [99]

    placed(database_url, work, RecordingLimits(3, 1 << 20, 0.0))


def test_a_request_larger_than_a_recording_is_not_kept(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        place.ask(1)
        assert await place.prompts() == []

    placed(database_url, work, RecordingLimits(3, OVERHEAD_BYTES, 0.0))


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=20),
    most=st.integers(1, 8),
    most_bytes=st.integers(OVERHEAD_BYTES, 4 * OVERHEAD_BYTES),
)
def test_a_recording_is_the_newest_requests_that_fit_both_bounds(
    sizes: list[int], most: int, most_bytes: int
) -> None:
    engine = create_engine("sqlite://")
    all_tables().create_all(engine)
    requests = [
        RecordedRequest("d", "b", 0.0, (number,), (0,) * size) for number, size in enumerate(sizes)
    ]
    with engine.begin() as connection:
        table.switch_on(connection, MINE, 0.0)
        for request in requests:
            table.keep(connection, MINE, request, most=most, most_bytes=most_bytes)
        kept = table.requests(connection, MINE)
    engine.dispose()
    assert kept == requests[len(requests) - len(kept) :]
    assert len(kept) <= most
    assert sum(request.size for request in kept) <= most_bytes
    if len(kept) < min(most, len(requests)):
        largest = max(request.size for request in requests)
        assert sum(request.size for request in kept) + largest > most_bytes


def test_switched_off_nothing_is_left_or_written_any_more(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        place.ask(1)
        opened = Opened("r", Caller("acme", "k", "infer"), "sql", "sql", 2, 4, 1, 0.0)
        late = place.recorder.begin(
            opened, Submit("r", (5,), SAMPLING, adapters=(Component("d1"),), seed=0)
        )
        assert late is not None
        late.add((1,))
        await place.recorder.switch_off(MINE)
        late.keep()
        await place.recorder.switch_on(MINE)
        assert await place.prompts() == []

    placed(database_url, work)


def test_another_server_takes_a_recording_up_and_drops_it(database_url: str) -> None:
    async def work(place: Place) -> None:
        async def other(there: Place) -> None:
            assert there.ask(1)
            await there.recorder.switch_off(MINE)

        await place.recorder.switch_on(MINE)
        database = Database.open(database_url)
        revisions = Revisions(database)
        second = Place(
            database,
            Recorder(database, revisions, PLENTY, "tiny", lambda: ((), ()), lambda: 1.0),
            revisions,
        )
        await revisions.look()
        await other(second)
        await database.close()
        await place.revisions.look()
        assert not place.ask(2)

    placed(database_url, work)


def test_what_removed_adapters_and_versions_answered_is_forgotten(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        place.ask(1, digest="d1")
        place.ask(2, digest="d2")
        place.digests.remove("d1")
        assert await place.prompts() == [1, 2]
        await place.recorder.sweep()
        assert await place.prompts() == [2]
        place.names.clear()
        await place.recorder.sweep()
        assert await place.prompts() == []
        assert await place.recorder.states("acme") == []
        assert not place.ask(3)

    placed(database_url, work)


def test_with_room_for_none_nothing_is_recorded(database_url: str) -> None:
    async def work(place: Place) -> None:
        await place.recorder.switch_on(MINE)
        assert not place.ask(1)

    placed(database_url, work, RecordingLimits(0, 1 << 20, 0.0))
