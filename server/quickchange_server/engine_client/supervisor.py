"""Supervisor of the engine process: starts it, restarts it when it dies, and at last gives up.

Requests are not known here: the listener keeps those that an engine had and submits them to the
next.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal, Protocol

from quickchange_server.config import Settings
from quickchange_server.engine_client.channel import EngineChannel, EngineMain
from quickchange_server.errors import EngineFailedError
from quickchange_server.protocol import Ready, Report, Shutdown

Phase = Literal["starting", "ready", "restarting", "failed", "stopped"]

START_SECONDS = 1800.0  # a start that takes longer hangs; a large model on a slow disk: minutes
STOP_SECONDS = 5.0  # for an orderly shutdown; then the process is killed
MAX_FAILURES = 5  # consecutive failed starts
LONG_LIFE_SECONDS = 30.0  # an idle engine that lived this long counts as started
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0

logger = logging.getLogger(__name__)


class EngineListener(Protocol):
    """Receiver of the engine's events, on the event loop's thread."""

    def engine_ready(self, ready: Ready) -> None:
        """A new engine accepts commands."""

    def engine_reported(self, report: Report) -> None:
        """The engine sent a report other than Ready and Fatal."""

    def engine_died(self, reason: str) -> bool:
        """The engine is gone. Returns True if it had requests, so its start had succeeded."""
        ...

    def engine_failed(self, reason: str) -> None:
        """No engine runs, and none will be started any more."""


class Supervisor:
    """One engine at a time, from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        main: EngineMain,
        listener: EngineListener,
        *,
        start_seconds: float = START_SECONDS,
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        self._settings = settings
        self._main = main
        self._listener = listener
        self._start_seconds = start_seconds
        self._first_backoff_seconds = first_backoff_seconds
        self._phase: Phase = "starting"
        self._channel: EngineChannel | None = None
        self._info: Ready | None = None
        self._ready_at = 0.0
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
        channel = EngineChannel(self._main, self._settings, self._listener.engine_reported)
        self._channel = channel
        first: set[asyncio.Future[Any]] = {channel.ready, channel.ended}
        await asyncio.wait(first, timeout=self._start_seconds, return_when=asyncio.FIRST_COMPLETED)
        if channel.ready.done() and not channel.ended.done():
            return self._started(channel.ready.result())
        if channel.ended.done():
            reason = channel.ended.result()
        else:
            channel.kill()
            await channel.ended
            reason = f"the engine was not ready after {self._start_seconds:g} seconds"
        self._channel = None
        raise EngineFailedError(reason)

    def _started(self, ready: Ready) -> Ready:
        self._info = ready
        self._ready_at = asyncio.get_running_loop().time()
        self._phase = "ready"
        self._listener.engine_ready(ready)
        return ready

    async def _supervise(self) -> None:
        """Wait for the engine's end, report it and start the next one, until a restart fails."""
        while self._channel is not None:
            # Shielded: cancelling the wait would cancel the future, which `stop` awaits too.
            reason = await asyncio.shield(self._channel.ended)
            self._died(reason)
            await self._restart(reason)

    def _died(self, reason: str) -> None:
        lived = asyncio.get_running_loop().time() - self._ready_at
        self._phase = "restarting"
        self._channel = None
        logger.error("engine lost after %.1f s: %s; starting another", lived, reason)
        blameless = self._listener.engine_died(reason) or lived >= LONG_LIFE_SECONDS
        self._failures = 0 if blameless else self._failures + 1

    async def _restart(self, reason: str) -> None:
        while self._failures < MAX_FAILURES:
            await asyncio.sleep(self._backoff_seconds())
            try:
                await self._launch()
            except EngineFailedError as error:
                self._failures += 1
                reason = error.message
                logger.error("%s (%d of %d)", reason, self._failures, MAX_FAILURES)
            else:
                return
        self._fail(f"the engine failed {self._failures} times in a row, at last: {reason}")

    def _backoff_seconds(self) -> float:
        if self._failures == 0:
            return 0.0
        doubled = self._first_backoff_seconds * 2.0 ** (self._failures - 1)
        return min(LAST_BACKOFF_SECONDS, doubled)

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
