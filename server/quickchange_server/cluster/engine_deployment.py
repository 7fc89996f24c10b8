"""An engine as a replica of Ray Serve: one actor with an engine process of its own.

The actor has no tensors. A crash of the engine process is mended within it, as on a single
machine; the loss of the actor or its node is seen by the ingresses, which go on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from quickchange_server.cluster import serve_replica
from quickchange_server.cluster.board import BoardAnswer
from quickchange_server.cluster.ray_calls import answer
from quickchange_server.cluster.routing.routing_memory import routing_stats
from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.in_flight_request import Mail
from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.entrypoints.engine_start import engine_main, preload
from quickchange_server.errors import EngineFailedError, QuickchangeError, UnavailableError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.observability.replica_metrics import OwnSnapshot
from quickchange_server.protocol import Delta, Forget, Pin, Prefetch, StepStats, Submit

REPORT_SECONDS = 0.25
WARM_SECONDS = 30.0  # longest a new replica loads popular adapters before it takes requests
WARM_SHARE = 0.9  # of the device budget that is filled ahead
POPULAR_MOST = 256  # adapter versions whose popularity is told
HALF_LIFE_SECONDS = 600.0  # of a request's weight in popularity
# Between two batches of a stream, times the streams at work: a batch costs the actor and the
# ingress half a millisecond each, so many streams get more tokens at once instead of all cores.
PACE_SECONDS = 0.001
SMOOTHING = 0.1  # weight of the latest step in the mean of its time

logger = logging.getLogger(__name__)


class Figures(Metrics):
    """The replica's metrics, and the figures among them that routing and scaling go by."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.stats: StepStats | None = None
        self.step_seconds = 0.0

    def step(self, stats: StepStats, name_of: Any) -> None:
        super().step(stats, name_of)
        self.stats = stats
        weight = SMOOTHING if self.step_seconds else 1.0
        self.step_seconds += weight * (stats.seconds - self.step_seconds)

    def state(self, stats: StepStats) -> None:
        super().state(stats)
        self.stats = stats


class Demand:
    """Counts of the requests for each adapter version, older ones weighing less."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._aged = time.monotonic()

    def add(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._counts[digest] += 1.0

    def most(self) -> dict[str, float]:
        """The POPULAR_MOST that are asked for most; the others are forgotten."""
        now = time.monotonic()
        share = 0.5 ** ((now - self._aged) / HALF_LIFE_SECONDS)
        self._aged = now
        best = sorted(self._counts.items(), key=lambda item: -item[1])[:POPULAR_MOST]
        self._counts = defaultdict(float, {d: share * n for d, n in best if share * n > 0.01})
        return dict(self._counts)


class EngineReplica:
    """The user's class of the deployment `Engine`."""

    _open = False  # started, and not ended

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, settings: Settings, board: Any, main: EngineMain = engine_main
    ) -> None:
        serve_replica.log()
        self._settings = settings
        self._board = board
        self._label, self._node = serve_replica.label(), serve_replica.node()
        self._figures = Figures(settings)
        self._demand = Demand()
        self._state = "starting"
        self._serving: set[asyncio.Task[Any]] = set()  # of `generate`
        self._giving_back = False
        self._heard = BoardAnswer("", 0, (), ())
        self._own = OwnSnapshot(self._figures.registry, self._label, "engine")
        serve_replica.leave_main_alone()
        if settings.device == "cpu" and main is engine_main:
            preload()
        engines = partial(LocalEngines, main=main)
        self._client = EngineClient(settings, self._figures, engines)
        self._reporting = asyncio.create_task(self._report_on(), name="reports")
        await self._client.start()
        await self._warm_up()
        self._state, self._open = "ready", True
        await self._report()

    # --- what ingresses call --------------------------------------------------------------------

    async def generate(
        self, submit: Submit
    ) -> AsyncGenerator[str | tuple[Delta, ...] | Exception, None]:
        """Run one sequence: this replica's label, then the deltas, those of several steps at once
        where they have piled up.

        Instead of its last comes the error that it ended with, ReplicaLostError where this
        replica, which is to end, gives it back: Serve would log one that is raised as its own.
        """
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            yield self._label
            async with aclosing(self._deltas(submit)) as deltas:
                async for batch in deltas:
                    yield batch
        except (UnavailableError, EngineFailedError) as error:
            # its engines fail one after another: another replica's may not
            yield error if self._client.state == "ready" else _given_back(error.message)
        except (QuickchangeError, ReplicaLostError) as error:
            yield error
        except asyncio.CancelledError:
            if not self._giving_back or task.uncancel():
                raise
            yield _given_back()
        finally:
            self._serving.discard(task)

    async def _deltas(self, submit: Submit) -> AsyncGenerator[tuple[Delta, ...], None]:
        if self._giving_back:
            raise _given_back()
        self._demand.add(component.digest for component in submit.adapters)
        stream = self._client.generate((submit,), label=submit.label, drafter=submit.drafter)
        try:
            last: Delta | None = None
            while last is None or last.finish_reason is None:
                batch = [_delta(await stream.receive())]
                if last is not None and batch[-1].finish_reason is None:
                    await asyncio.sleep(PACE_SECONDS * len(self._serving))
                while batch[-1].finish_reason is None and (mail := stream.receive_now()):
                    batch.append(_delta(mail))
                last = batch[-1]
                yield tuple(batch)
        finally:
            stream.close()

    async def command(self, command: AdapterCommand) -> None:
        """Have an adapter version loaded, pinned or dropped."""
        match command:
            case Prefetch(digest, tier):
                self._client.prefetch(digest, tier)
            case Pin(digest, pinned):
                self._client.pin(digest, pinned)
            case Forget(digest):
                self._client.forget(digest)

    # --- what Serve calls -----------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raise if engines fail one after another, so that Serve replaces the replica."""
        if self._client.state == "failed":
            raise EngineFailedError("engines of this replica fail one after another")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Figures that routers go by."""
        report, info = self._figures_now(), self._client.info
        return routing_stats(
            report.residency,
            device_bytes=0 if info is None else info.adapter_device_bytes,
            queue=report.running + report.waiting,
            kv_share=report.kv_share,
            step_seconds=report.step_seconds,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Figures that `autoscaling.EnginesWanted` goes by."""
        report = self._figures_now()
        return {"queue": float(report.running + report.waiting), "kv_share": report.kv_share}

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """The end, which Serve awaits; the interpreter, which calls it too, comes after that."""
        if not self._open:
            return None
        self._open = False
        return self.end()

    async def end(self) -> None:
        """End the engine, and leave the board."""
        self._reporting.cancel()
        await self._client.close(0.0)
        try:
            await answer(self._board.leave.remote, self._label)
        except ReplicaLostError:
            logger.info("the board did not hear of the end of %s", self._label)

    # --- reports --------------------------------------------------------------------------------

    def _figures_now(self, metrics: bytes = b"") -> ReplicaReport:
        stats, info = self._figures.stats, self._client.info
        used = 0 if stats is None else stats.kv_blocks_used
        running, waiting = self._client.adapters_in_flight()
        return ReplicaReport(
            self._label,
            "engine",
            self._node,
            self._state if self._client.state == "ready" else self._client.state,
            info=info,
            residency=self._client.residency.snapshot(),
            running=0 if stats is None else stats.running,
            waiting=0 if stats is None else stats.waiting,
            running_adapters=running,
            waiting_adapters=waiting,
            kv_share=used / info.kv_blocks if info is not None and info.kv_blocks else 0.0,
            step_seconds=self._figures.step_seconds,
            metrics=metrics,
            at=time.time(),
        )

    async def _report_on(self) -> None:
        """Report for ever, and give all back when the replica has been ending for too long."""
        ending_at = None
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._report()
            if ending_at is None and serve_replica.is_stopping():
                ending_at = time.monotonic()
                self._state = "draining"
                logger.info("%s drains %d sequences", self._label, self._client.in_flight)
            if ending_at and time.monotonic() - ending_at >= self._settings.drain_seconds:
                self._give_back()

    def _give_back(self) -> None:
        if not self._giving_back:
            self._giving_back = True
            logger.info("%s gives back %d sequences", self._label, len(self._serving))
            for task in self._serving:
                task.cancel()

    async def _report(self) -> None:
        """Tell the board, and do what it has heard meanwhile."""
        before = self._heard
        try:
            self._heard = await answer(
                self._board.report.remote,
                self._figures_now(await self._own.latest()),
                self._demand.most(),
                before.board,
                before.heard,
            )
        except (ReplicaLostError, QuickchangeError) as error:
            logger.info("the board does not answer: %s", error)
            return
        pins, known = set(self._heard.pins), set(self._client.residency.pins)
        for digest in self._heard.forgets:
            self._client.forget(digest)
        for digest in self._heard.pins:
            if digest not in known:
                self._client.pin(digest, True)
        if self._heard.board == before.board:  # one that begins anew may not know all pins yet
            for digest in known - pins:
                self._client.pin(digest, False)

    async def _warm_up(self) -> None:
        """Load what requests ask for most, as far as the device budget allows."""
        try:
            popular = await answer(self._board.popular.remote, POPULAR_MOST)
        except (ReplicaLostError, QuickchangeError) as error:
            logger.info("nothing is loaded ahead: %s", error)
            return
        left = WARM_SHARE * self._client.engine.adapter_device_bytes
        wanted = []
        for adapter in popular:
            if adapter.bytes == 0 or adapter.bytes > left:
                continue
            left -= adapter.bytes
            wanted.append(adapter.digest)
            self._client.prefetch(adapter.digest)
        end = time.monotonic() + WARM_SECONDS
        residency = self._client.residency
        while time.monotonic() < end and not all(
            digest in residency and residency[digest].tier == "device" for digest in wanted
        ):
            await asyncio.sleep(0.05)
        loaded = sum(d in residency and residency[d].tier == "device" for d in wanted)
        logger.info("%s has loaded %d of %d adapters ahead", self._label, loaded, len(wanted))


def _given_back(why: str = "the replica is to end") -> ReplicaLostError:
    return ReplicaLostError(why, given_back=True)


def _delta(mail: Mail) -> Delta:
    """The delta of the only sequence of a stream. Raises the error that came instead."""
    _, delta = mail
    if isinstance(delta, QuickchangeError):
        raise delta
    return delta
