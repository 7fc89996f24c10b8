"""The engine of this machine, with every sequence in flight with it.

An engine that dies is replaced, and its sequences continue where they stood; one that ends engines
is found and given up, and with it all that ask for the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from cachetools import TTLCache

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.engine_client.client_observer import EngineObserver
from quickchange_server.engine_client.engines import AdapterCommand, Ended, Phase
from quickchange_server.engine_client.in_flight_request import InFlightRequest
from quickchange_server.engine_client.local.channel import Death, EngineChannel, EngineMain
from quickchange_server.engine_client.local.crash_recovery import CrashRecovery
from quickchange_server.engine_client.local.supervisor import Supervisor
from quickchange_server.engine_client.local.trial_engine import TrialEngine, has_room
from quickchange_server.errors import EngineFailedError, QuickchangeError, RequestFailedError
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

GIVEN_UP_SECONDS = 600.0  # for which a request is refused that asks for what ended engines
GIVEN_UP_MOST = 256  # requests that are remembered

logger = logging.getLogger(__name__)


class LocalEngines:
    """`Engines` of this machine: one that serves, and one for trials while there are suspects."""

    def __init__(
        self, settings: Settings, observer: EngineObserver, ended: Ended, *, main: EngineMain
    ) -> None:
        """main: the engine process's entry."""
        self._settings = settings
        self._observer = observer
        self._ended = ended
        self._main = main
        self._supervisor = Supervisor(settings, main, self)
        self._recovery = CrashRecovery(settings.max_request_deaths)
        self._trials: TrialEngine | None = None
        self._closing: set[asyncio.Task[None]] = set()  # of trial engines
        self._given_up: TTLCache[Submit, str] = TTLCache(GIVEN_UP_MOST, GIVEN_UP_SECONDS)
        self._residency = AdapterStatus()
        self._prefetches: dict[str, Prefetch] = {}  # requested while no engine was ready
        self._failure: str | None = None

    @property
    def phase(self) -> Phase:
        return self._supervisor.phase

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def seconds_to_ready(self) -> float:
        return self._supervisor.seconds_to_ready

    @property
    def info(self) -> Ready | None:
        return self._supervisor.info

    @property
    def pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def residency(self) -> AdapterStatus:
        return self._residency

    @property
    def requests(self) -> Collection[InFlightRequest]:
        return self._recovery.requests

    async def start(self) -> Ready:
        return await self._supervisor.start()

    async def stop(self) -> None:
        self._close_trials()
        if self._closing:
            await asyncio.wait(self._closing)
        await self._supervisor.stop()

    def check(self, submits: Iterable[Submit]) -> None:
        if not self._given_up:
            return
        for submit in submits:
            if (message := self._given_up.get(_content_of(submit))) is not None:
                raise RequestFailedError(message)

    def submit(self, *requests: InFlightRequest) -> None:
        self._recovery.add(*requests)
        self._submit_waiting()

    def cancel(self, request: InFlightRequest) -> None:
        self._withdraw(request)
        if request.suspect:
            self._submit_waiting()

    def command(self, command: AdapterCommand) -> None:
        match command:
            case Pin(digest, pinned):
                self._residency.pin(digest, pinned)  # if no engine is ready, the next gets it
            case Forget(digest):  # the next engine would not hold it anyway
                self._residency.forget(digest)
                self._prefetches.pop(digest, None)
        if not self._send(command) and isinstance(command, Prefetch):
            self._prefetches[command.digest] = command

    # --- events from the supervisor -------------------------------------------------------------

    def engine_ready(self, ready: Ready) -> None:
        self._observer.engine_started(ready)
        for digest in self._residency.pins:
            self._send(Pin(digest, True))
        for command in self._prefetches.values():
            self._send(command)
        self._prefetches.clear()
        self._submit_waiting()

    def engine_reported(self, report: Report) -> None:
        match report:
            case StepReport(deltas, stats):
                self._observer.step(stats, self._residency.label)
                self._deliver_all(deltas)
            case Pulse(stats):
                self._observer.state(stats)
            case Began(submission_ids):
                self._began(submission_ids)
            case AdapterMoved():
                self._observer.adapter_moved(report, self._residency.moved(report))
            case AdapterFailed():
                logger.error("adapter %s could not be loaded: %s", report.digest, report.error)
                self._residency.pin(report.digest, False)  # as the engine has done
                self._observer.adapter_failed()

    def engine_died(self, death: Death) -> bool:
        self._observer.engine_died()
        self._residency.clear()
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
        while self.requests:  # one that fails makes room for its request's next
            self._fail(next(iter(self.requests)), EngineFailedError(reason))
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
        self._observer.trial_died()
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

    # --- sequences ------------------------------------------------------------------------------

    def _send(self, command: Command) -> bool:
        """Send a command. Returns False if no engine is ready to take it."""
        if self.phase != "ready":
            return False
        self._supervisor.channel.send(command)
        return True

    def _submit_waiting(self) -> None:
        """Submit the waiting requests that may run now, and see to the trials of suspects."""
        if self.phase == "ready":
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
            self._observer.resubmitted()
        return submit

    def _trial_channel(self) -> EngineChannel | None:
        """The channel of the engine that a suspect may have now; starts and ends trial engines."""
        if not self._recovery.apart:
            return self._supervisor.channel if self.phase == "ready" else None
        if self._recovery.on_trial is None and not self._recovery.suspects_wait:
            self._close_trials()
            return None
        if self._trials is None:
            prices = () if self.info is None else self.info.prices
            self._trials = TrialEngine(self._settings, self._main, self, prices)
        return self._trials.channel

    def _close_trials(self) -> None:
        if self._trials is None:
            return
        closing = asyncio.create_task(self._trials.close(), name="trial-engine-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._trials = None

    def _withdraw(self, request: InFlightRequest) -> None:
        """Take a request from the engine that has it, if one does."""
        if request.submission_id is not None:
            cancel = Cancel(request.submission_id)
            if not (self._recovery.apart and self._recovery.on_trial is request):
                self._send(cancel)
            elif self._trials is not None and self._trials.channel is not None:
                self._trials.channel.send(cancel)
        self._recovery.remove(request)

    def _began(self, submission_ids: Sequence[str]) -> None:
        for submission_id in submission_ids:
            self._recovery.began(submission_id)

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

    def _convict(self, culprit: InFlightRequest, death: Death) -> None:
        """Give up a request that ends engines, and all that ask for the same."""
        content = _content_of(culprit.submit)
        message = _culprit_message(culprit, death.reason)
        self._given_up[content] = message
        logger.error("request %s ended an engine alone; given up", culprit.request_id)
        same = [r for r in self.requests if _content_of(r.submit) == content]
        for request in same:
            self._withdraw(request)
        for request in (culprit, *same):
            request.later.clear()  # its request ends with it
            self._fail(request, RequestFailedError(message))

    def _fail(self, request: InFlightRequest, error: QuickchangeError) -> None:
        now = time.monotonic()
        request.fail(error, now)
        self._remove(request, now)

    def _remove(self, request: InFlightRequest, now: float) -> None:
        """Remove a sequence that has ended, and go on if it ended a trial."""
        self._recovery.remove(request)
        self._ended(request, now)
        if request.suspect:
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
