"""One sequence on its way through a cluster: from replica to replica, until it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing

from quickchange_server.engine_client.client_observer import EngineObserver, Interruption
from quickchange_server.engine_client.in_flight_request import InFlightRequest
from quickchange_server.engine_client.remote.cluster_watch import ClusterWatch
from quickchange_server.engine_client.remote.replica_calls import ReplicaCalls, ReplicaLostError
from quickchange_server.errors import RequestFailedError

# An attempt that is lost sooner, without a token, may have found no replica: the next one is at
# once, those behind it wait.
PLACED_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 0.5
LAST_PAUSE_SECONDS = 4.0

TRIED_ALONE = 2  # losses without getting on, after which a sequence is a suspect


class SequenceRun:
    """The way of one sequence. Times are monotonic seconds."""

    def __init__(
        self,
        request: InFlightRequest,
        calls: ReplicaCalls,
        watch: ClusterWatch,
        observer: EngineObserver,
        trial: asyncio.Lock,
        max_deaths: int,
        ended: Callable[[InFlightRequest], None],
    ) -> None:
        """trial: held by the suspect that runs. ended: called at the last delta."""
        self._request = request
        self._calls = calls
        self._watch = watch
        self._observer = observer
        self._trial = trial
        self._max_deaths = max_deaths
        self._ended = ended
        self._homeless_since = self._heard_at = time.monotonic()
        self._misses = 0  # attempts in a row that found no replica
        self._loss: ReplicaLostError | None = None  # since its last token

    async def run(self) -> None:
        """Run the sequence until it is finished.

        Raises UnavailableError if no replica takes it for a minute, RequestFailedError if it is
        given up, and what a replica refuses it with.
        """
        while not self._request.finished:
            async with AsyncExitStack() as alone:
                suspect = self._request.deaths >= TRIED_ALONE
                if suspect:
                    asked = time.monotonic()
                    await alone.enter_async_context(self._trial)
                    self._homeless_since += time.monotonic() - asked
                await self._watch.until_served(self._homeless_since)
                began = time.monotonic()
                try:
                    await self._attempt(alone)
                except ReplicaLostError as loss:
                    self._lost(loss, time.monotonic() - began, suspect=suspect)
                else:
                    return
            await asyncio.sleep(pause(self._misses))

    async def _attempt(self, alone: AsyncExitStack) -> None:
        """Read the sequence from one replica. alone: left once it has got on."""
        request = self._request
        submit = request.next_submission()
        if request.submissions > 1:
            self._observer.resubmitted()
        async with aclosing(self._calls.generate(submit)) as batches:
            async for batch in batches:
                now = time.monotonic()
                for delta in batch:
                    if not request.finished:
                        request.deliver(delta, now)
                self._heard(now)
                if request.finished:
                    self._ended(request)  # before the call is closed, which may take its time
                    return
                if request.progress >= request.telling:
                    await alone.aclose()
        raise ReplicaLostError("the replica's stream ended before the last delta")

    def _heard(self, now: float) -> None:
        if self._loss is not None:
            reason: Interruption = "drained" if self._loss.given_back else "lost"
            self._observer.resumed(reason, now - self._heard_at)
            self._loss = None
        self._heard_at = now

    def _lost(self, loss: ReplicaLostError, seconds: float, *, suspect: bool) -> None:
        """Count a loss. Raises RequestFailedError if the sequence is to blame for it."""
        request, self._loss = self._request, loss
        if request.progress or seconds >= PLACED_SECONDS:
            self._homeless_since, self._misses = time.monotonic(), 0
        else:
            self._misses += 1
        if loss.given_back:
            return
        request.count_death()
        if suspect and request.progress < request.telling and request.deaths >= self._max_deaths:
            raise RequestFailedError(
                f"{request.deaths} engine replicas were lost in a row while they ran this request "
                f"(at last: {loss}), so it is given up; ask for something else, or send it again "
                "if they were lost for another reason"
            ) from loss


def pause(misses: int) -> float:
    """Seconds before the next attempt, after so many in a row that found no replica."""
    if misses < 2:
        return 0.0
    return min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(misses - 2, 30))
