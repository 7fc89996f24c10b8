"""The API process's client of its engines: admission, streams, adapters, drain.

Token ids in, token ids out: HTTP, text and tensors are not known here, nor where the engines run.
Used from one event loop. A refused client gets a Retry-After computed from the recent throughput.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus, Residence
from quickchange_server.engine_client.client_observer import ClientObserver, Outcome
from quickchange_server.engine_client.engines import EnginesMaker
from quickchange_server.engine_client.in_flight_request import DeltaStream, InFlightRequest, Mail
from quickchange_server.errors import QueueFullError, RequestFailedError, UnavailableError
from quickchange_server.protocol import Forget, Pin, Prefetch, Ready, Submit

__all__ = ["DeltaStream", "EngineClient", "Residence", "State"]

State = Literal["starting", "ready", "restarting", "draining", "failed"]

STARTING_RETRY_SECONDS = 5.0
THROUGHPUT_SECONDS = 60.0  # requests that ended within it are counted
THROUGHPUT_REQUESTS = 256  # at most so many
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
UNKNOWN_SECONDS = 5.0  # a guess, if no request has ended lately
FREED_SHARE = 0.1  # share of the queue to be freed, since many refused clients come back

logger = logging.getLogger(__name__)


class Throughput:
    """End times of the latest requests, in monotonic seconds."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=THROUGHPUT_REQUESTS)

    def ended(self, now: float) -> None:
        self._ends.append(now)

    def retry_after(self, queue_length: int, now: float) -> float:
        """Seconds until FREED_SHARE of a queue of `queue_length` is free, at the recent rate."""
        while self._ends and now - self._ends[0] > THROUGHPUT_SECONDS:
            self._ends.popleft()
        if not self._ends:
            return UNKNOWN_SECONDS
        seconds_per_request = max(now - self._ends[0], SHORTEST_SECONDS) / len(self._ends)
        wanted = max(1.0, FREED_SHARE * queue_length) * seconds_per_request
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, wanted))


class EngineClient:
    """Engines and every request in flight with them.

    `start` and `close` it on the event loop that uses it.
    """

    def __init__(self, settings: Settings, metrics: ClientObserver, engines: EnginesMaker) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engines = engines(settings, metrics, self._ended)
        self._throughput = Throughput()
        self._draining_until: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch(self)

    @property
    def state(self) -> State:
        phase = self._engines.phase
        if phase == "failed":
            return "failed"
        if phase == "stopped" or self._draining_until is not None:
            return "draining"
        return phase

    @property
    def info(self) -> Ready | None:
        """The Ready report of the last engine that started."""
        return self._engines.info

    @property
    def engine(self) -> Ready:
        """The same as `info`. Raises UnavailableError while no engine has been ready."""
        if self.info is None:
            raise UnavailableError(
                f"the engine is {self.state}; try again shortly",
                retry_after=STARTING_RETRY_SECONDS,
            )
        return self.info

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while there is none on this machine."""
        return self._engines.pid

    @property
    def in_flight(self) -> int:
        """Number of requests admitted and not ended."""
        return len(self._engines.requests)

    @property
    def residency(self) -> AdapterStatus:
        """Adapter versions on the device or host tier, by digest."""
        return self._engines.residency

    def adapters_in_flight(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the adapters of running requests, and of those that only waiting ones have.

        Compositions count as the names that their adapters have. May be called on any thread.
        """
        running: set[str] = set()
        waiting: set[str] = set()
        for request in list(self._engines.requests):
            (running if request.runs else waiting).update(self._names_of(request.submit))
        return frozenset(running), frozenset(waiting - running)

    async def start(self) -> Ready:
        """Start the engine. Raises EngineFailedError with the engine's own reason if it can't."""
        return await self._engines.start()

    async def close(self, drain_seconds: float) -> None:
        """Refuse new requests, give running ones `drain_seconds` to end, then end the engine.

        Requests still running then fail with UnavailableError.
        """
        self._draining_until = time.monotonic() + drain_seconds
        try:
            async with asyncio.timeout(drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests cut off by the end of the server", self.in_flight)
            self._cut_off()
        await self._engines.stop()

    def generate(
        self, submits: Sequence[Submit], *, label: str = "base", drafter: str | None = None
    ) -> DeltaStream:
        """Admit all sequences of a request or none, and return their deltas.

        At most half the queue is taken; each further sequence follows one of them that has ended.
        `label`: the adapter's name in metrics; `drafter`: the name of the adapter whose draft
        heads are used. Raises QueueFullError (with `retry_after`) if `max_queue` sequences would
        be exceeded, UnavailableError while the server starts, drains or has failed, and
        RequestFailedError if the same was lately given up because it ended engines. During an
        engine's restart requests are admitted and wait.
        """
        now = time.monotonic()
        self._refuse_given_up(submits)
        first = self._at_once(len(submits))
        self._admit(now, first)
        later: deque[InFlightRequest] = deque()
        mailbox: asyncio.Queue[Mail] = asyncio.Queue()
        requests = []
        for index, submit in enumerate(submits):
            self._name(submit, label, drafter)
            adapted = bool(submit.adapters)
            metrics = self._metrics.request(label, adapted, len(submit.prompt), now)
            requests.append(InFlightRequest(submit, metrics, mailbox, index, drafter, later))
        self._engines.submit(*requests[:first])
        later.extend(requests[first:])
        self._idle.clear()
        return DeltaStream(requests, mailbox, self._leave)

    def check_room(self, count: int) -> None:
        """Raise what `generate` would raise for `count` sequences now."""
        self._admit(time.monotonic(), self._at_once(count))

    def prefetch(self, digest: str, tier: Literal["device", "host"] = "device") -> None:
        """Load an adapter version to `tier`, if its budget allows."""
        self._engines.command(Prefetch(digest, tier))

    def pin(self, digest: str, pinned: bool) -> None:
        """Pin an adapter version to the device, also across restarts, or unpin it."""
        self._engines.command(Pin(digest, pinned))

    def forget(self, digest: str) -> None:
        """Drop an adapter version from both tiers once no request uses it."""
        self._engines.command(Forget(digest))

    def _at_once(self, count: int) -> int:
        """Sequences that a request of `count` has in the queue."""
        return min(count, max(1, self._settings.max_queue // 2))

    def _refuse_given_up(self, submits: Sequence[Submit]) -> None:
        try:
            self._engines.check(submits)
        except RequestFailedError:
            self._metrics.refused("given_up")
            raise

    def _admit(self, now: float, count: int = 1) -> None:
        match self.state:
            case "failed":
                reason = f"the engine has failed: {self._engines.failure}"
                ready = max(1.0, self._engines.seconds_to_ready)
                self._refuse(UnavailableError(reason, retry_after=ready))
            case "starting":
                reason = "the engine is starting; try again shortly"
                self._refuse(UnavailableError(reason, retry_after=STARTING_RETRY_SECONDS))
            case "draining":
                left = max(1.0, (self._draining_until or now) - now)
                reason = "the server is shutting down; try again shortly"
                self._refuse(UnavailableError(reason, retry_after=left))
        limit = self._settings.max_queue
        if self.in_flight + count > limit:
            self._metrics.refused("queue_full")
            raise QueueFullError(
                f"{self.in_flight} of the {limit} sequences that the setting max_queue allows are "
                f"in flight, and this request needs room for {count}; try again later",
                retry_after=self._throughput.retry_after(self.in_flight, now),
            )

    def _refuse(self, error: UnavailableError) -> None:
        self._metrics.refused("unavailable")
        raise error

    def _name(self, submit: Submit, label: str, drafter: str | None) -> None:
        """Remember the adapter names behind a sequence's digests."""
        digests = {component.digest for component in submit.adapters}
        if len(digests) == 1:
            self.residency.name(digests.pop(), label)
        drafting = submit.drafting
        if drafting is not None:
            self._metrics.drafting(drafting)
            if drafting.heads is not None and drafter is not None:
                self.residency.name(drafting.heads, drafter)

    def _names_of(self, submit: Submit) -> Iterable[str]:
        digests = dict.fromkeys(component.digest for component in submit.adapters)
        if len(digests) == 1:
            return (submit.label,)
        names = (self.residency.label(digest) for digest in digests)
        return (name for name in names if name is not None)

    def _leave(self, request: InFlightRequest, outcome: Outcome) -> None:
        """Cancel a request whose reader has stopped reading."""
        self._engines.cancel(request)
        now = time.monotonic()
        request.end(outcome, now)
        self._ended(request, now)

    def _cut_off(self) -> None:
        """Fail all requests, since the server ends."""
        while self._engines.requests:  # one that fails makes room for its request's next
            request = next(iter(self._engines.requests))
            self._engines.cancel(request)
            now = time.monotonic()
            reason = "the server is shutting down; send the request again"
            request.fail(UnavailableError(reason), now)
            self._ended(request, now)

    def _ended(self, request: InFlightRequest, now: float) -> None:
        """Note the end of a sequence, and submit the one that this makes room for."""
        self._throughput.ended(now)
        if request.later:
            self._engines.submit(request.later.popleft())
        if self.in_flight == 0:
            self._idle.set()
