"""Recorder of served requests, by tenant and adapter, where the tenant has asked for it.

A recording takes one request in a while, so that it is spread over the time and a burst does not
fill it, and it holds so many of the newest. The event loop only collects token ids; the database's
writer thread does the rest. Not recorded are compositions and weights, shadows, embeddings,
requests that fail or are cancelled, and those with a `cache_salt`, whose sender wants nothing of
them to show in other requests' times.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import Connection

from quickchange_server.frontend.request_observers import Opened
from quickchange_server.protocol import Submit
from quickchange_server.storage.database import Database
from quickchange_server.storage.recordings import tables_recordings as table
from quickchange_server.storage.recordings.tables_recordings import (
    RecordedRequest,
    Recording,
    RecordingState,
)
from quickchange_server.storage.revisions import Revisions, bump

TOPIC = "recordings"
SWEEP_SECONDS = 60.0  # until what other processes removed from the store is forgotten

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecordingLimits:
    """Bounds of one recording."""

    requests: int
    bytes: int
    seconds: float  # from one request that is taken to the next, on one server


@dataclass(slots=True)
class _Underway:
    """A request that is being recorded."""

    recorder: Recorder
    recording: Recording
    digest: str
    prompt: tuple[int, ...]
    output: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int]) -> None:
        self.output += token_ids

    def keep(self) -> None:
        self.recorder.keep(self.recording, self.digest, self.prompt, self.output)


class Recorder:
    """One server's recordings, on its event loop."""

    def __init__(
        self,
        database: Database,
        revisions: Revisions,
        limits: RecordingLimits,
        base: str,
        there: Callable[[], tuple[Collection[str], Collection[str]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`base`: the base model's name. `there`: the names and the digests that the store has."""
        self._database = database
        self._revisions = revisions
        self._limits = limits
        self._base = base
        self._there = there
        self._clock = clock
        self._next: dict[Recording, float] = {}  # when each recording takes a request again
        self._sweeping: asyncio.Task[None] | None = None
        revisions.watch(TOPIC, self._refresh)

    def start(self) -> None:
        """Begin to look every SWEEP_SECONDS for adapters that are gone."""
        self._sweeping = asyncio.create_task(self._sweep_on(), name="recordings")

    async def close(self) -> None:
        """Stop looking."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])

    # --- requests -------------------------------------------------------------------------------

    def begin(self, opened: Opened, submit: Submit) -> _Underway | None:
        """The record of a request, if its tenant records its adapter and its turn has come."""
        if not self._next:
            return None
        recording = Recording(opened.caller.tenant, opened.label)
        due = self._next.get(recording)
        now = self._clock()
        if due is None or now < due or not _recordable(submit):
            return None
        self._next[recording] = now + self._limits.seconds
        return _Underway(self, recording, submit.adapters[0].digest, submit.prompt)

    def keep(
        self, recording: Recording, digest: str, prompt: tuple[int, ...], output: Sequence[int]
    ) -> None:
        """Have a request written, unless it alone is too large or its recording has ended."""
        request = RecordedRequest(digest, self._base, time.time(), prompt, tuple(output))
        limits = self._limits
        if request.size > limits.bytes or recording not in self._next or not output:
            return
        change = partial(
            table.keep,
            recording=recording,
            request=request,
            most=limits.requests,
            most_bytes=limits.bytes,
        )
        self._database.record(change).add_done_callback(_tell_lost)

    # --- recordings -----------------------------------------------------------------------------

    async def switch_on(self, recording: Recording) -> None:
        """Begin a recording; one that is there goes on. Raises UnavailableError."""
        now = time.time()
        await self._change(lambda connection: table.switch_on(connection, recording, now))

    async def switch_off(self, recording: Recording) -> None:
        """End a recording, if there is one, and delete what it holds. Raises UnavailableError."""
        self._next.pop(recording, None)
        await self._change(lambda connection: table.switch_off(connection, recording))

    async def states(self, tenant: str) -> list[RecordingState]:
        """The tenant's recordings. Raises UnavailableError."""
        return await self._database.read(partial(table.states, tenant=tenant))

    async def requests(self, recording: Recording) -> list[RecordedRequest]:
        """What a recording holds, the oldest first. Raises UnavailableError."""
        return await self._database.read(partial(table.requests, recording=recording))

    async def _change(self, change: Callable[[Connection], object]) -> None:
        def changed(connection: Connection) -> None:
            change(connection)
            bump(connection, TOPIC)

        await self._database.write(changed)
        await self._revisions.take_up()

    async def _refresh(self) -> None:
        on = await self._database.read(table.every) if self._limits.requests else []
        self._next = {recording: self._next.get(recording, 0.0) for recording in on}

    async def sweep(self) -> None:
        """Delete what is recorded of adapters and versions that the store no longer has.

        What can't be deleted now is logged, and deleted by a later sweep.
        """
        if not self._next:
            return
        try:
            names, digests = await asyncio.to_thread(self._there)
            answering = await self._database.read(table.answering)
            gone = answering.keys() - set(names)
            old = {digest for each in answering.values() for digest in each} - set(digests)
            if gone or old:
                await self._change(lambda connection: table.forget(connection, gone, old))
        except Exception as error:
            logger.warning("recordings of removed adapters stay for now: %s", error)

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()


def _recordable(submit: Submit) -> bool:
    whole = [(term.weight, term.begin, term.end) for term in submit.adapters] == [(1, 0, None)]
    plain = submit.pooling is None and not submit.background and not submit.cache_salt
    return whole and plain


def _tell_lost(written: asyncio.Future[None]) -> None:
    if not written.cancelled() and (error := written.exception()) is not None:
        logger.warning("a recorded request is lost: %s", error)
