"""Supervisor of the engine process: starts it, and replaces it when it dies or hangs.

Engines that can't be had are tried for again after growing pauses, for ever; after some failures
the listener is told not to wait. Requests are not known here: the listener keeps those that an
engine had and submits them to the next.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from quickchange_server.config import Settings
from quickchange_server.engine_client.engines import Phase
from quickchange_server.engine_client.local.channel import Death, EngineChannel, EngineMain
from quickchange_server.errors import EngineFailedError
from quickchange_server.protocol import Begin, Ping, Prices, Ready, Report, Shutdown

STOP_SECONDS = 5.0  # for an orderly shutdown; then the process is killed
MAX_FAILURES = 5  # consecutive failures after which requests no longer wait for a next engine
LONG_LIFE_SECONDS = 30.0  # an idle engine that lived this long counts as started
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 60.0
LEAST_RESTART_SECONDS = 60.0  # that a restart may take, whatever the last start took...
RESTART_PATIENCE = 10.0  # ... or this many times as long
STEP_PATIENCE = 10.0  # an engine may be silent for this many of its longest steps
LOOKS = 8  # at a silent engine, within the time that it may be silent

logger = logging.getLogger(__name__)


class EngineListener(Protocol):
    """Receiver of the engine's events, on the event loop's thread."""

    def engine_ready(self, ready: Ready) -> None:
        """A new engine accepts commands."""

    def engine_reported(self, report: Report) -> None:
        """The engine sent a report other than Ready and Fatal."""

    def engine_died(self, death: Death) -> bool:
        """The engine is gone. Returns True if it had requests, so its start had succeeded."""
        ...

    def engine_failed(self, reason: str) -> None:
        """No engine can be had for now, so nothing should wait for one."""


class Supervisor:
    """One engine at a time, from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        main: EngineMain,
        listener: EngineListener,
        *,
        prices: Prices = (),
        first_backoff_seconds: float | None = None,
    ) -> None:
        """prices: for the first engine, if they are known."""
        self._settings = settings
        self._main = main
        self._listener = listener
        self._prices = prices
        self._first_backoff_seconds = first_backoff_seconds or FIRST_BACKOFF_SECONDS
        self._phase: Phase = "starting"
        self._channel: EngineChannel | None = None
        self._info: Ready | None = None
        self._begun_at = 0.0  # or to begin: the last start, on the loop's clock
        self._ready_at = 0.0
        self._took = 0.0  # seconds of the last start that succeeded
        self._failures = 0
        self._watch: asyncio.Task[None] | None = None

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def info(self) -> Ready | None:
        """The Ready report of the last engine that started."""
        return self._info

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while there is none."""
        return None if self._channel is None else self._channel.pid

    @property
    def seconds_to_ready(self) -> float:
        """Seconds until the start under way, or the next one, should be done."""
        return max(0.0, self._begun_at + self._took - asyncio.get_running_loop().time())

    async def start(self) -> Ready:
        """Start the first engine. Raises EngineFailedError with the engine's own reason.

        A first start is not retried: it fails because of a setting or the model, which don't
        change.
        """
        if self._phase != "starting" or self._channel is not None:
            raise RuntimeError("an engine is started once")
        try:
            ready = await self._launch()
        except EngineFailedError as error:
            self._fail(error.message)
            raise
        self._watch = asyncio.create_task(self._supervise(), name="engine-supervisor")
        self._watch.add_done_callback(self._supervision_ended)
        return ready

    @property
    def channel(self) -> EngineChannel:
        """The running engine's channel. Raises RuntimeError unless `phase` is "ready"."""
        if self._channel is None:
            raise RuntimeError("no engine to send to")
        return self._channel

    async def stop(self) -> None:
        """Shut the engine down, or kill it if it does not end in time. May be called again."""
        self._phase = "stopped"
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._channel is not None:
            await self._end(self._channel)
            self._channel = None

    async def _end(self, channel: EngineChannel) -> None:
        if channel.ready.done():  # while it loads, an engine reads no commands
            channel.send(Shutdown())
            await asyncio.wait([channel.ended], timeout=STOP_SECONDS)
        if not channel.ended.done():
            logger.info("killing engine process %s, which did not end when asked to", channel.pid)
            channel.kill()
            await channel.ended

    async def _launch(self) -> Ready:
        """Start an engine and wait until it is ready. Raises EngineFailedError if it ends or
        hangs before that."""
        self._begun_at = asyncio.get_running_loop().time()
        begin = Begin(self._prices)
        channel = EngineChannel(self._main, self._settings, self._listener.engine_reported, begin)
        self._channel = channel
        first: set[asyncio.Future[Any]] = {channel.ready, channel.ended}
        limit = self._start_limit()
        await asyncio.wait(first, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if channel.ready.done() and not channel.ended.done():
            return self._started(channel.ready.result())
        if not channel.ended.done():
            channel.give_up(f"the engine was not ready after {limit:g} seconds")
        death = await channel.ended
        self._channel = None
        raise EngineFailedError(death.reason)

    def _start_limit(self) -> float:
        """Seconds that a start may take."""
        most = self._settings.engine_start_seconds
        if self._info is None:
            return most
        return min(most, max(LEAST_RESTART_SECONDS, RESTART_PATIENCE * self._took))

    def _started(self, ready: Ready) -> Ready:
        self._info = ready
        self._prices = ready.prices
        self._ready_at = asyncio.get_running_loop().time()
        self._took = self._ready_at - self._begun_at
        self._phase = "ready"
        self._listener.engine_ready(ready)
        return ready

    async def _supervise(self) -> None:
        """Wait for the engine's end, report it and start the next one, for ever."""
        while self._channel is not None:
            death = await self._death(self._channel)
            self._died(death)
            await self._restart(death.reason)

    async def _death(self, channel: EngineChannel) -> Death:
        """Wait until the engine has ended, and kill it if it hangs.

        Silence is counted in looks, each of which counts for little even if it comes late: where
        this process was stopped too, or slow, that time is not held against the engine.
        """
        limit = self._stall_seconds()
        pause = None if limit is None else limit / LOOKS
        heard, silence, asked = channel.reports, 0, False
        while True:
            # Not `wait_for`, which would cancel the future, which `stop` awaits too.
            await asyncio.wait([channel.ended], timeout=pause)
            if channel.ended.done():
                return channel.ended.result()
            if not asked or channel.reports != heard:
                heard, silence, asked = channel.reports, 0, True
                channel.send(Ping())
            elif (silence := silence + 1) >= LOOKS:
                logger.error("the engine hangs (process %s); killing it", channel.pid)
                channel.give_up(f"the engine did not answer for {limit:g} seconds and was killed")

    def _stall_seconds(self) -> float | None:
        """Seconds of silence after which the engine hangs; None: never."""
        if not self._settings.engine_stall_seconds:
            return None
        longest = max((seconds for _, seconds in self._prices), default=0.0)
        return max(self._settings.engine_stall_seconds, STEP_PATIENCE * longest)

    def _died(self, death: Death) -> None:
        lived = asyncio.get_running_loop().time() - self._ready_at
        self._phase = "restarting"
        self._channel = None
        logger.error("engine lost after %.1f s: %s; starting another", lived, death.reason)
        blameless = self._listener.engine_died(death) or lived >= LONG_LIFE_SECONDS
        self._failures = 0 if blameless else self._failures + 1

    async def _restart(self, reason: str) -> None:
        """Start engines, with growing pauses between, until one is ready."""
        while self._phase != "ready":
            if self._failures >= MAX_FAILURES:
                self._fail(f"the engine failed {self._failures} times in a row, at last: {reason}")
            pause = self._backoff_seconds()
            self._begun_at = asyncio.get_running_loop().time() + pause
            await asyncio.sleep(pause)
            try:
                await self._launch()
            except EngineFailedError as error:
                self._failures += 1
                reason = error.message
                logger.error("%s (failure %d in a row)", reason, self._failures)

    def _backoff_seconds(self) -> float:
        if self._failures == 0:
            return 0.0
        doublings = min(self._failures - 1, 30)
        return min(LAST_BACKOFF_SECONDS, self._first_backoff_seconds * 2.0**doublings)

    def _fail(self, reason: str) -> None:
        if self._phase == "stopped":
            return
        self._phase = "failed"
        self._listener.engine_failed(reason)

    def _supervision_ended(self, watch: asyncio.Task[None]) -> None:
        """Fail all requests if supervision itself has crashed, so that none waits for ever."""
        if not watch.cancelled() and (error := watch.exception()) is not None:
            logger.error("supervision of the engine ended", exc_info=error)
            self._fail(f"supervision of the engine ended: {error!r}")
