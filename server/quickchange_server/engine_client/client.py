"""The API process's handle on the engine: admission, streams, adapters, drain.

Token ids in, token ids out: knows nothing of HTTP, of text or of tensors. Used from one event loop.
An engine that dies is replaced, and what was in flight goes on where it stood.

How soon a refused client should come back, from how fast requests have ended lately.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import Residence, Residences
from quickchange_server.engine_client.channel import EngineMain
from quickchange_server.engine_client.client_observer import ClientObserver, Outcome
from quickchange_server.engine_client.crash_recovery import Roster
from quickchange_server.engine_client.in_flight_request import DeltaStream, Flight, Mail
from quickchange_server.engine_client.supervisor import START_SECONDS, Supervisor
from quickchange_server.errors import (
    EngineFailedError,
    QueueFullError,
    QuickchangeError,
    RequestFailedError,
    UnavailableError,
)
from quickchange_server.protocol import (
    AdapterFailed,
    AdapterMoved,
    Cancel,
    Command,
    Delta,
    Forget,
    Pin,
    Prefetch,
    Ready,
    Report,
    StepReport,
    Submit,
)

WINDOW_SECONDS = 60.0
WINDOW_REQUESTS = 256
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
UNKNOWN_SECONDS = 5.0  # nothing has ended lately: a guess
FREED_SHARE = 0.1  # of the queue, before it makes sense to come back: many others come too


class Throughput:
    """Times at which the last requests ended, in monotonic seconds."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=WINDOW_REQUESTS)

    def ended(self, now: float) -> None:
        self._ends.append(now)

    def retry_after(self, queue_length: int, now: float) -> float:
        """Seconds until a share of a queue of `queue_length` is free, at the recent rate."""
        while self._ends and now - self._ends[0] > WINDOW_SECONDS:
            self._ends.popleft()
        if not self._ends:
            return UNKNOWN_SECONDS
        seconds_per_request = max(now - self._ends[0], SHORTEST_SECONDS) / len(self._ends)
        wanted = max(1.0, FREED_SHARE * queue_length) * seconds_per_request
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, wanted))


__all__ = ["DeltaStream", "EngineClient", "Residence", "State"]

State = Literal["starting", "ready", "restarting", "draining", "failed"]

STARTING_RETRY_SECONDS = 5.0
FAILED_RETRY_SECONDS = 60.0  # until someone has restarted the server

logger = logging.getLogger(__name__)


class EngineClient:
    """One engine, supervised, and every request that is with it.

    `start` it on the event loop that uses it, and `close` it there.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: ClientObserver,
        engine_main: EngineMain,
        *,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._supervisor = Supervisor(settings, engine_main, self, start_seconds=start_seconds)
        self._roster = Roster(settings.max_request_deaths)
        self._residences = Residences()
        self._prefetches: dict[str, Prefetch] = {}  # asked for while no engine was ready
        self._throughput = Throughput()
        self._draining_until: float | None = None
        self._failure: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch(self)

    @property
    def state(self) -> State:
        phase = self._supervisor.phase
        if phase == "failed":
            return "failed"
        if phase == "stopped" or self._draining_until is not None:
            return "draining"
        return phase

    @property
    def info(self) -> Ready | None:
        """What the engine said of itself when it was ready last."""
        return self._supervisor.info

    @property
    def engine(self) -> Ready:
        """The same. Raises UnavailableError while no engine has been ready."""
        if self.info is None:
            raise UnavailableError(
                f"the engine is {self.state}; try again shortly",
                retry_after=STARTING_RETRY_SECONDS,
            )
        return self.info

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while there is none."""
        return self._supervisor.pid

    @property
    def in_flight(self) -> int:
        """Requests admitted and not ended."""
        return len(self._roster)

    @property
    def residency(self) -> Residences:
        """Adapter versions on the device or host tier, by digest."""
        return self._residences

    async def start(self) -> Ready:
        """Start the engine. Raises EngineFailedError with the engine's own reason if it can't."""
        return await self._supervisor.start()

    async def close(self, drain_seconds: float) -> None:
        """Admit no more, let running requests end for `drain_seconds`, then end the engine.

        Requests that are still running then fail with UnavailableError.
        """
        self._draining_until = time.monotonic() + drain_seconds
        try:
            async with asyncio.timeout(drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests cut off by the end of the server", self.in_flight)
            self._fail_all(UnavailableError("the server is shutting down; send the request again"))
        await self._supervisor.stop()

    def generate(
        self, submits: Sequence[Submit], *, label: str = "base", drafter: str | None = None
    ) -> DeltaStream:
        """Admit the sequences of a request, at once and all or none, and return their deltas.

        `label`: the adapter's name in metrics; `drafter`: that of the adapter whose heads draft.
        Raises QueueFullError (with `retry_after`) where `max_queue` sequences would be exceeded,
        and UnavailableError while the server starts, drains or has failed. While the engine is
        being restarted requests are admitted and wait.
        """
        now = time.monotonic()
        self._admit(now, len(submits))
        mailbox: asyncio.Queue[Mail] = asyncio.Queue()
        flights = []
        for index, submit in enumerate(submits):
            self._name(submit, label, drafter)
            adapted = bool(submit.adapters)
            metrics = self._metrics.request(label, adapted, len(submit.prompt), now)
            flights.append(Flight(submit, metrics, mailbox, index, drafter))
        self._roster.add(*flights)
        self._idle.clear()
        self._depart()
        return DeltaStream(flights, mailbox, self._leave)

    def check_room(self, count: int) -> None:
        """Raise what `generate` would, were it given so many sequences now."""
        self._admit(time.monotonic(), count)

    def prefetch(self, digest: str, tier: Literal["device", "host"] = "device") -> None:
        """Have an adapter version brought to `tier`, if its budget allows."""
        command = Prefetch(digest, tier)
        if not self._tell(command):
            self._prefetches[digest] = command

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter version on the device, over restarts too, or no more."""
        self._residences.pin(digest, pinned)
        self._tell(Pin(digest, pinned))  # else sent when an engine is ready

    def forget(self, digest: str) -> None:
        """Have an adapter version dropped from both tiers once no request uses it."""
        self._residences.forget(digest)
        self._prefetches.pop(digest, None)
        self._tell(Forget(digest))  # a new engine knows nothing of it anyway

    # --- what the supervisor tells --------------------------------------------------------------

    def engine_ready(self, ready: Ready) -> None:
        self._metrics.engine_started(ready)
        for digest in self._residences.pins:
            self._tell(Pin(digest, True))
        for command in self._prefetches.values():
            self._tell(command)
        self._prefetches.clear()
        self._depart()

    def engine_reported(self, report: Report) -> None:
        match report:
            case StepReport():
                self._stepped(report)
            case AdapterMoved():
                self._metrics.adapter_moved(report, self._residences.moved(report))
            case AdapterFailed():
                logger.error("adapter %s could not be loaded: %s", report.digest, report.error)
                self._residences.pin(report.digest, False)  # as the engine has done
                self._metrics.adapter_failed()

    def engine_died(self, reason: str) -> bool:
        self._metrics.engine_died()
        self._residences.clear()
        had_requests = self._roster.anything_aboard
        culprit = self._roster.engine_died()
        if culprit is not None:
            logger.error("request %s ended the engine alone; given up", culprit.request_id)
            self._ended(culprit, RequestFailedError(_culprit_message(culprit, reason)))
        return had_requests

    def engine_failed(self, reason: str) -> None:
        self._failure = reason
        self._fail_all(EngineFailedError(reason))

    # --- requests -------------------------------------------------------------------------------

    def _admit(self, now: float, count: int = 1) -> None:
        match self.state:
            case "failed":
                reason = f"the engine has failed: {self._failure}"
                self._refuse(UnavailableError(reason, retry_after=FAILED_RETRY_SECONDS))
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
                f"in flight, and this request has {count}; try again later",
                retry_after=self._throughput.retry_after(self.in_flight, now),
            )

    def _name(self, submit: Submit, label: str, drafter: str | None) -> None:
        """Note the names of what a sequence is served by."""
        if len(submit.adapters) == 1:
            self._residences.name(submit.adapters[0].digest, label)
        drafting = submit.drafting
        if drafting is not None:
            self._metrics.drafting(drafting)
            if drafting.heads is not None and drafter is not None:
                self._residences.name(drafting.heads, drafter)

    def _refuse(self, error: UnavailableError) -> None:
        self._metrics.refused("unavailable")
        raise error

    def _tell(self, command: Command) -> bool:
        """Send a command if an engine takes it."""
        if self._supervisor.phase != "ready":
            return False
        self._supervisor.channel.send(command)
        return True

    def _depart(self) -> None:
        """Submit what may go to the engine now."""
        if self._supervisor.phase != "ready":
            return
        for flight in self._roster.departures():
            submit = flight.board()
            self._roster.boarded(flight)
            if flight.submissions > 1:
                self._metrics.resubmitted()
            self._supervisor.channel.send(submit)

    def _stepped(self, report: StepReport) -> None:
        now = time.monotonic()
        self._metrics.step(report.stats, self._residences.label)
        for delta in report.deltas:
            self._deliver(delta, now)
        if self._roster.on_trial is not None:
            self._consider_trial()

    def _deliver(self, delta: Delta, now: float) -> None:
        flight = self._roster.find(delta.request_id)
        if flight is None:
            return  # its reader has gone, or it was submitted again since
        flight.deliver(delta, now)
        if flight.finished:
            self._landed(flight, now)

    def _consider_trial(self) -> None:
        cancelled = self._roster.acquit()
        if cancelled is not None:
            self._tell(Cancel(cancelled))
        self._depart()

    def _leave(self, flight: Flight, outcome: Outcome) -> None:
        """The flight's reader wants no more."""
        if flight.ticket is not None:
            self._tell(Cancel(flight.ticket))
        now = time.monotonic()
        flight.end(outcome, now)
        self._landed(flight, now)

    def _ended(self, flight: Flight, error: QuickchangeError) -> None:
        now = time.monotonic()
        flight.fail(error, now)
        self._landed(flight, now)

    def _fail_all(self, error: QuickchangeError) -> None:
        for flight in list(self._roster.flights):
            self._ended(flight, type(error)(error.message, retry_after=error.retry_after))

    def _landed(self, flight: Flight, now: float) -> None:
        """Take an ended flight off the books."""
        was_on_trial = self._roster.on_trial is flight
        self._roster.remove(flight)
        self._throughput.ended(now)
        if len(self._roster) == 0:
            self._idle.set()
        elif was_on_trial:
            self._depart()


def _culprit_message(flight: Flight, reason: str) -> str:
    return (
        f"the engine ended {flight.deaths} times while it ran this request, the last time with "
        f"nothing beside it ({reason}); it is not tried again"
    )
