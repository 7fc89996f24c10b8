"""The API process's client of the engine: admission, streams, adapters, drain.

Token ids in, token ids out: HTTP, text and tensors are not known here. Used from one event loop.
An engine that dies is replaced, and requests in flight continue where they stood. A refused client
gets a Retry-After computed from the recent throughput.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from cachetools import TTLCache

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus, Residence
from quickchange_server.engine_client.channel import Death, EngineChannel, EngineMain
from quickchange_server.engine_client.client_observer import ClientObserver, Outcome
from quickchange_server.engine_client.crash_recovery import CrashRecovery
from quickchange_server.engine_client.in_flight_request import DeltaStream, InFlightRequest, Mail
from quickchange_server.engine_client.supervisor import Supervisor
from quickchange_server.engine_client.trial_engine import TrialEngine, has_room
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
    Began,
    Cancel,
    Command,
    Delta,
    Forget,
    Pin,
    Prefetch,
    Pulse,
    Ready,
    Report,
    StepReport,
    Submit,
)

__all__ = ["DeltaStream", "EngineClient", "Residence", "State"]

State = Literal["starting", "ready", "restarting", "draining", "failed"]

STARTING_RETRY_SECONDS = 5.0
THROUGHPUT_SECONDS = 60.0  # requests that ended within it are counted
THROUGHPUT_REQUESTS = 256  # at most so many
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
UNKNOWN_SECONDS = 5.0  # a guess, if no request has ended lately
FREED_SHARE = 0.1  # share of the queue to be freed, since many refused clients come back

GIVEN_UP_SECONDS = 600.0  # for which a request is refused that asks for what ended engines
GIVEN_UP_MOST = 256  # requests that are remembered

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
    """A supervised engine and every request in flight with it.

    `start` and `close` it on the event loop that uses it.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: ClientObserver,
        engine_main: EngineMain,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine_main = engine_main
        self._supervisor = Supervisor(settings, engine_main, self)
        self._recovery = CrashRecovery(settings.max_request_deaths)
        self._trials: TrialEngine | None = None
        self._closing: set[asyncio.Task[None]] = set()  # of trial engines
        self._given_up: TTLCache[Submit, str] = TTLCache(GIVEN_UP_MOST, GIVEN_UP_SECONDS)
        self._adapter_status = AdapterStatus()
        self._prefetches: dict[str, Prefetch] = {}  # requested while no engine was ready
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
        """The Ready report of the last engine that started."""
        return self._supervisor.info

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
        """The engine's process id; None while there is none."""
        return self._supervisor.pid

    @property
    def in_flight(self) -> int:
        """Number of requests admitted and not ended."""
        return len(self._recovery)

    @property
    def residency(self) -> AdapterStatus:
        """Adapter versions on the device or host tier, by digest."""
        return self._adapter_status

    async def start(self) -> Ready:
        """Start the engine. Raises EngineFailedError with the engine's own reason if it can't."""
        return await self._supervisor.start()

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
            self._fail_all(UnavailableError("the server is shutting down; send the request again"))
        self._close_trials()
        if self._closing:
            await asyncio.wait(self._closing)
        await self._supervisor.stop()

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
        self._recovery.add(*requests[:first])
        later.extend(requests[first:])
        self._idle.clear()
        self._submit_waiting()
        return DeltaStream(requests, mailbox, self._leave)

    def check_room(self, count: int) -> None:
        """Raise what `generate` would raise for `count` sequences now."""
        self._admit(time.monotonic(), self._at_once(count))

    def _at_once(self, count: int) -> int:
        """Sequences that a request of `count` has in the queue."""
        return min(count, max(1, self._settings.max_queue // 2))

    def prefetch(self, digest: str, tier: Literal["device", "host"] = "device") -> None:
        """Load an adapter version to `tier`, if its budget allows."""
        command = Prefetch(digest, tier)
        if not self._send(command):
            self._prefetches[digest] = command

    def pin(self, digest: str, pinned: bool) -> None:
        """Pin an adapter version to the device, also across restarts, or unpin it."""
        self._adapter_status.pin(digest, pinned)
        self._send(Pin(digest, pinned))  # if no engine is ready, `engine_ready` sends it

    def forget(self, digest: str) -> None:
        """Drop an adapter version from both tiers once no request uses it."""
        self._adapter_status.forget(digest)
        self._prefetches.pop(digest, None)
        self._send(Forget(digest))  # a new engine would not hold it anyway

    # --- events from the supervisor -------------------------------------------------------------

    def engine_ready(self, ready: Ready) -> None:
        self._metrics.engine_started(ready)
        for digest in self._adapter_status.pins:
            self._send(Pin(digest, True))
        for command in self._prefetches.values():
            self._send(command)
        self._prefetches.clear()
        self._submit_waiting()

    def engine_reported(self, report: Report) -> None:
        match report:
            case StepReport():
                self._stepped(report)
            case Pulse(stats):
                self._metrics.state(stats)
            case Began(submission_ids):
                self._began(submission_ids)
            case AdapterMoved():
                self._metrics.adapter_moved(report, self._adapter_status.moved(report))
            case AdapterFailed():
                logger.error("adapter %s could not be loaded: %s", report.digest, report.error)
                self._adapter_status.pin(report.digest, False)  # as the engine has done
                self._metrics.adapter_failed()

    def engine_died(self, death: Death) -> bool:
        self._metrics.engine_died()
        self._adapter_status.clear()
        had_requests = self._recovery.any_submitted
        culprit = self._recovery.engine_died(outside=death.outside)
        if self._trials is None:
            self._recovery.apart = has_room(self._settings, self.info)
        if culprit is not None:
            self._convict(culprit, death)
        self._submit_waiting()
        return had_requests

    def engine_failed(self, reason: str) -> None:
        self._failure = reason
        self._fail_all(EngineFailedError(reason))
        self._close_trials()

    # --- events from the trial engine -----------------------------------------------------------

    def trial_ready(self) -> None:
        self._submit_waiting()

    def trial_reported(self, report: Report) -> None:
        match report:
            case StepReport(deltas):
                self._deliver_all(deltas)
            case Began(submission_ids):
                self._began(submission_ids)

    def trial_died(self, death: Death) -> None:
        self._metrics.trial_died()
        culprit = self._recovery.trial_died()
        if culprit is not None:
            self._convict(culprit, death)
        self._submit_waiting()

    def trial_failed(self) -> None:
        """Try the suspects in the engine that serves; the others wait meanwhile."""
        self._close_trials()
        self._recovery.apart = False
        for submission_id in self._recovery.recall():
            self._send(Cancel(submission_id))
        self._submit_waiting()

    # --- requests -------------------------------------------------------------------------------

    def _admit(self, now: float, count: int = 1) -> None:
        match self.state:
            case "failed":
                reason = f"the engine has failed: {self._failure}"
                ready = max(1.0, self._supervisor.seconds_to_ready)
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

    def _name(self, submit: Submit, label: str, drafter: str | None) -> None:
        """Remember the adapter names behind a sequence's digests."""
        if len(submit.adapters) == 1:
            self._adapter_status.name(submit.adapters[0].digest, label)
        drafting = submit.drafting
        if drafting is not None:
            self._metrics.drafting(drafting)
            if drafting.heads is not None and drafter is not None:
                self._adapter_status.name(drafting.heads, drafter)

    def _refuse(self, error: UnavailableError) -> None:
        self._metrics.refused("unavailable")
        raise error

    def _send(self, command: Command) -> bool:
        """Send a command. Returns False if no engine is ready to take it."""
        if self._supervisor.phase != "ready":
            return False
        self._supervisor.channel.send(command)
        return True

    def _submit_waiting(self) -> None:
        """Submit the waiting requests that may run now, and see to the trials of suspects."""
        if self._supervisor.phase == "ready":
            for request in self._recovery.to_submit():
                submit = self._next_submission(request)
                self._recovery.submitted(request)
                self._supervisor.channel.send(submit)
        channel = self._trial_channel()
        if channel is not None and (suspect := self._recovery.to_try()) is not None:
            submit = self._next_submission(suspect)
            self._recovery.tried(suspect)
            channel.send(submit)

    def _next_submission(self, request: InFlightRequest) -> Submit:
        submit = request.next_submission()
        if request.submissions > 1:
            self._metrics.resubmitted()
        return submit

    def _trial_channel(self) -> EngineChannel | None:
        """The channel of the engine that a suspect may have now; starts and ends trial engines."""
        if not self._recovery.apart:
            ready = self._supervisor.phase == "ready"
            return self._supervisor.channel if ready else None
        if self._recovery.on_trial is None and not self._recovery.suspects_wait:
            self._close_trials()
            return None
        if self._trials is None:
            prices = () if self.info is None else self.info.prices
            self._trials = TrialEngine(self._settings, self._engine_main, self, prices)
        return self._trials.channel

    def _close_trials(self) -> None:
        if self._trials is None:
            return
        closing = asyncio.create_task(self._trials.close(), name="trial-engine-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._trials = None

    def _send_to_holder(self, request: InFlightRequest, command: Command) -> None:
        """Send a command to the engine that has the request."""
        if self._recovery.apart and self._recovery.on_trial is request:
            if self._trials is not None and self._trials.channel is not None:
                self._trials.channel.send(command)
        else:
            self._send(command)

    def _began(self, submission_ids: Sequence[str]) -> None:
        for submission_id in submission_ids:
            self._recovery.began(submission_id)

    def _stepped(self, report: StepReport) -> None:
        self._metrics.step(report.stats, self._adapter_status.label)
        self._deliver_all(report.deltas)

    def _deliver_all(self, deltas: Sequence[Delta]) -> None:
        now = time.monotonic()
        for delta in deltas:
            self._deliver(delta, now)
        if self._recovery.on_trial is not None:
            self._consider_trial()

    def _deliver(self, delta: Delta, now: float) -> None:
        request = self._recovery.find(delta.request_id)
        if request is None:
            return  # the reader has gone, or the request has been resubmitted since
        request.deliver(delta, now)
        if request.finished:
            self._remove(request, now)

    def _consider_trial(self) -> None:
        """End the trial if it has shown enough."""
        holder = self._trial_channel()
        cancelled = self._recovery.acquit()
        if cancelled is not None and holder is not None:
            holder.send(Cancel(cancelled))
        if self._recovery.on_trial is None:
            self._submit_waiting()

    def _leave(self, request: InFlightRequest, outcome: Outcome) -> None:
        """Cancel a request whose reader has stopped reading."""
        if request.submission_id is not None:
            self._send_to_holder(request, Cancel(request.submission_id))
        now = time.monotonic()
        request.end(outcome, now)
        self._remove(request, now)

    def _refuse_given_up(self, submits: Sequence[Submit]) -> None:
        if not self._given_up:
            return
        for submit in submits:
            if (message := self._given_up.get(_content_of(submit))) is not None:
                self._metrics.refused("given_up")
                raise RequestFailedError(message)

    def _convict(self, culprit: InFlightRequest, death: Death) -> None:
        """Give up a request that ends engines, and all that ask for the same."""
        content = _content_of(culprit.submit)
        message = _culprit_message(culprit, death.reason)
        self._given_up[content] = message
        logger.error("request %s ended an engine alone; given up", culprit.request_id)
        same = [r for r in self._recovery.requests if _content_of(r.submit) == content]
        for request in same:
            if request.submission_id is not None:
                self._send_to_holder(request, Cancel(request.submission_id))
            self._recovery.remove(request)
        for request in (culprit, *same):
            request.later.clear()  # its request ends with it
            self._fail(request, RequestFailedError(message))

    def _fail(self, request: InFlightRequest, error: QuickchangeError) -> None:
        now = time.monotonic()
        request.fail(error, now)
        self._remove(request, now)

    def _fail_all(self, error: QuickchangeError) -> None:
        while self._recovery.requests:  # one that fails makes room for its request's next
            request = next(iter(self._recovery.requests))
            self._fail(request, type(error)(error.message, retry_after=error.retry_after))

    def _remove(self, request: InFlightRequest, now: float) -> None:
        """Remove a sequence that has ended, submit those that this makes room for, and go on if
        it ended a trial."""
        self._recovery.remove(request)
        self._throughput.ended(now)
        follows = bool(request.later)
        if follows:
            self._recovery.add(request.later.popleft())
        if len(self._recovery) == 0:
            self._idle.set()
        if request.suspect or follows:
            self._submit_waiting()


def _content_of(submit: Submit) -> Submit:
    """What a submission asks for, without what differs from one that asks for the same."""
    return replace(submit, request_id="", output=(), seed=0, background=False)


def _culprit_message(request: InFlightRequest, reason: str) -> str:
    return (
        f"the engine ended {request.deaths} times while it ran this request, the last time with "
        f"nothing beside it ({reason}); it is not tried again, nor is the same for "
        f"{GIVEN_UP_SECONDS / 60:g} minutes; ask for something else"
    )
