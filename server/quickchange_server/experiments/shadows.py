"""Shadow requests, which run in the background and whose answers no client sees.

A shadow is dropped rather than queued: at most its experiment's limit run at once, and none start
while the server's queue fills. HTTP is not known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.request_observers import Assignment
from quickchange_server.observability.experiment_metrics import ExperimentMetrics

Admit = Callable[[], Awaitable[Generation]]

logger = logging.getLogger(__name__)


class Shadows:
    """The running shadows. `has_room`: returns True if the server has capacity to spare."""

    def __init__(self, metrics: ExperimentMetrics, has_room: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._has_room = has_room
        self._running: Counter[str] = Counter()  # by experiment
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self, assignment: Assignment, limit: int, admit: Admit) -> None:
        """Start a shadow on a task of its own, or drop it; returns at once."""
        experiment = assignment.experiment_id
        if self._closed or self._running[experiment] >= limit or not self._has_room():
            self._metrics.shadow_dropped(assignment)
            return
        self._running[experiment] += 1
        task = asyncio.create_task(self._run(assignment, admit), name="shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all shadows and start no more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, assignment: Assignment, admit: Admit) -> None:
        try:
            generation = await admit()
            async with aclosing(generation.pieces()) as pieces:
                async for _ in pieces:
                    pass
            await generation.account.settled()
        except QuickchangeError as error:
            logger.info(
                "a shadow of %s, %s, came to nothing: %s",
                assignment.experiment,
                assignment.variant,
                error,
            )
        finally:
            self._running[assignment.experiment_id] -= 1
