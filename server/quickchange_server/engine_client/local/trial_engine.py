"""A second engine in which suspects of a crash run alone, while the first serves the others.

It has the settings of the first, so that it gives the same tokens; its KV cache and its adapter
tiers take memory only as far as they are used.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Protocol

from quickchange_server.config import Settings
from quickchange_server.engine_client.local.channel import Death, EngineChannel, EngineMain
from quickchange_server.engine_client.local.supervisor import Supervisor
from quickchange_server.errors import EngineFailedError
from quickchange_server.protocol import Prices, Ready, Report

_ENGINES = 2.5  # what two engines need, in sizes of one that has just started
_CGROUP = Path("/sys/fs/cgroup")

logger = logging.getLogger(__name__)


class TrialListener(Protocol):
    """Receiver of a trial engine's events, on the event loop's thread."""

    def trial_ready(self) -> None:
        """A trial may begin."""

    def trial_reported(self, report: Report) -> None:
        """The engine sent a report other than Ready and Fatal."""

    def trial_died(self, death: Death) -> None:
        """The engine is gone; another is started, unless this one is closed."""

    def trial_failed(self) -> None:
        """No engine for trials can be had."""


class TrialEngine:
    """The engine for trials, from its construction to `close`, after which no event comes."""

    def __init__(
        self, settings: Settings, main: EngineMain, listener: TrialListener, prices: Prices
    ) -> None:
        """Begin to start it. prices: as the first engine measured them."""
        self._listener = listener
        self._closed = False
        self._supervisor = Supervisor(settings, main, self, prices=prices)
        self._start = asyncio.create_task(self._started(), name="trial-engine-start")

    @property
    def channel(self) -> EngineChannel | None:
        """The channel of the engine, while it is ready."""
        return self._supervisor.channel if self._supervisor.phase == "ready" else None

    async def close(self) -> None:
        """End the engine."""
        self._closed = True
        self._start.cancel()
        await asyncio.wait([self._start])
        await self._supervisor.stop()

    async def _started(self) -> None:
        try:
            await self._supervisor.start()
        except EngineFailedError as error:
            logger.warning("no engine for trials: %s", error.message)

    # --- events from the supervisor -------------------------------------------------------------

    def engine_ready(self, ready: Ready) -> None:
        logger.info("an engine for trials is ready after %.1f s", ready.load_seconds)
        if not self._closed:
            self._listener.trial_ready()

    def engine_reported(self, report: Report) -> None:
        if not self._closed:
            self._listener.trial_reported(report)

    def engine_died(self, death: Death) -> bool:
        if not self._closed:
            self._listener.trial_died(death)
        return True  # its suspect did it, so the next may start at once

    def engine_failed(self, reason: str) -> None:  # noqa: ARG002
        if not self._closed:
            self._listener.trial_failed()


def has_room(settings: Settings, first: Ready | None) -> bool:
    """True if memory has room for a trial engine beside the one that serves. Asked while neither
    is there.

    first: what the last engine that served said of itself. A device other than the CPU is taken to
    be full.
    """
    if settings.device != "cpu":
        return False
    return first is None or first.own_bytes * _ENGINES <= _free_bytes()


def _free_bytes() -> float:
    """Memory that this process and its children may still take; infinity where nothing tells."""
    free = float("inf")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = 1024.0 * int(line.split()[1])
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if limit and used and limit[0].isdigit():
        cached = [x for x in _lines(_CGROUP / "memory.stat") if x.startswith("inactive_file ")]
        reclaimable = int(cached[0].split()[1]) if cached else 0
        free = min(free, int(limit[0]) - int(used[0]) + reclaimable)
    return free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
