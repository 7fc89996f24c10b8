"""Engines elsewhere: each sequence in flight runs on one of a cluster's replicas.

The tokens that a sequence has emitted are held here. Where its replica is lost, another goes on
with the same text, since a sampled token depends on its seed and position alone. How calls reach
replicas, and which one routing picks, are not known here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from functools import partial

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.engine_client.client_observer import EngineObserver
from quickchange_server.engine_client.engines import AdapterCommand, Ended, Phase
from quickchange_server.engine_client.in_flight_request import InFlightRequest
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.engine_client.remote.cluster_watch import RETRY_SECONDS, ClusterWatch
from quickchange_server.engine_client.remote.replica_calls import ReplicaCalls
from quickchange_server.engine_client.remote.sequence_run import SequenceRun
from quickchange_server.errors import EngineFailedError, QuickchangeError
from quickchange_server.protocol import Ready, Submit

logger = logging.getLogger(__name__)


class RemoteEngines:
    """`Engines` of a cluster: a task for each sequence, which it cancels to take it back.

    A sequence whose replica is lost goes to another at once. One that is lost twice without getting
    on is a suspect: suspects run one at a time until they get on, and one that has then been
    present at `max_request_deaths` losses fails alone.
    """

    def __init__(
        self, settings: Settings, observer: EngineObserver, ended: Ended, *, calls: ReplicaCalls
    ) -> None:
        self._max_deaths = settings.max_request_deaths
        self._observer = observer
        self._ended = ended
        self._calls = calls
        self._watch = ClusterWatch(calls)
        self._requests: dict[str, InFlightRequest] = {}  # by request id, in order of arrival
        self._tasks: dict[InFlightRequest, asyncio.Task[None]] = {}
        self._trial = asyncio.Lock()
        self._stopped = False

    @property
    def view(self) -> ClusterView:
        """The cluster as it was last heard of."""
        return self._watch.view

    @property
    def phase(self) -> Phase:
        return "stopped" if self._stopped else self._watch.phase

    @property
    def failure(self) -> str | None:
        return self._watch.failure

    @property
    def seconds_to_ready(self) -> float:
        return RETRY_SECONDS

    @property
    def info(self) -> Ready | None:
        return self._watch.info

    @property
    def pid(self) -> None:
        """There is no engine on this machine."""

    @property
    def residency(self) -> AdapterStatus:
        return self._watch.residency

    @property
    def requests(self) -> Collection[InFlightRequest]:
        return self._requests.values()

    async def start(self) -> Ready:
        return await self._watch.start()

    async def stop(self) -> None:
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._watch.stop()

    def check(self, submits: Iterable[Submit]) -> None:
        """Let all pass: what has ended engines is known to the replicas, which refuse it."""

    def submit(self, *requests: InFlightRequest) -> None:
        arriving = {request.request_id: request for request in requests}
        for request_id in arriving:
            if request_id in self._requests:
                raise ValueError(f"request id {request_id!r} is already in flight")
        self._requests |= arriving
        for request in requests:
            task = asyncio.create_task(self._run(request), name=f"sequence-{request.request_id}")
            self._tasks[request] = task
            task.add_done_callback(partial(self._left, request))

    def cancel(self, request: InFlightRequest) -> None:
        self._requests.pop(request.request_id, None)
        if (task := self._tasks.get(request)) is not None:
            task.cancel()

    def command(self, command: AdapterCommand) -> None:
        self._watch.command(command)

    def _left(self, request: InFlightRequest, task: asyncio.Task[None]) -> None:  # noqa: ARG002
        self._tasks.pop(request)

    async def _run(self, request: InFlightRequest) -> None:
        run = SequenceRun(
            request,
            self._calls,
            self._watch,
            self._observer,
            self._trial,
            self._max_deaths,
            self._remove,
        )
        try:
            await run.run()
        except QuickchangeError as error:
            self._fail(request, error)
        except Exception as error:
            logger.exception("request %s failed outside of its replica", request.request_id)
            self._fail(request, EngineFailedError(f"the request could not be run: {error!r}"))

    def _fail(self, request: InFlightRequest, error: QuickchangeError) -> None:
        if not request.finished:
            request.fail(error, time.monotonic())
            self._remove(request)

    def _remove(self, request: InFlightRequest) -> None:
        del self._requests[request.request_id]
        self._ended(request, time.monotonic())
