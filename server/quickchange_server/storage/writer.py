"""One thread that makes every change, in the order they were asked for; many share one commit.

While one commit waits for the disk, what comes in queues up and shares the next: the more there
is to write, the more a commit carries. A change that fails is rolled back alone. While the
database is away, everything waits and is tried again in order.

Knows nothing of tables.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from quickchange_server.errors import UnavailableError
from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.outages import passes
from quickchange_server.storage.transactions import Change, ChangeOutcome, Transactions

QUEUE_LIMIT = 50_000  # changes that wait; some 1 KiB each
GROUP_LIMIT = 500  # changes of one transaction, which bounds how long it holds the write lock
WRITE_SECONDS = 10.0  # how long a change that somebody waits for outlasts the database's absence
CLOSE_SECONDS = 10.0  # how long closing does
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between tries

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class QueuedChange:
    """A change and who waits for it."""

    change: Change
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    gives_up: float | None = None  # monotonic; None: a record, which shares commits and waits on


class Writer:
    """The thread and its queue. `engine` is for transactions that write."""

    def __init__(self, engine: Engine, metrics: StorageMetrics) -> None:
        self._transactions = Transactions(engine)
        self._metrics = metrics
        self._waiting: deque[QueuedChange] = deque()
        self._group: list[QueuedChange] = []  # what the running transaction makes
        self._changed = threading.Condition()
        self._closed_at: float | None = None  # monotonic
        metrics.watch(self._length)
        self._thread = threading.Thread(target=self._run, name="database-writer", daemon=True)
        self._thread.start()

    def submit(self, change: Change, *, alone: bool) -> asyncio.Future[Any]:
        """Queue a change, on the event loop; the future is done after its commit.

        `alone`: in a transaction of its own, given up after WRITE_SECONDS without a database.
        Where QUEUE_LIMIT changes wait, or after `close`, the future fails with UnavailableError.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        gives_up = time.monotonic() + WRITE_SECONDS if alone else None
        with self._changed:
            if self._closed_at is None and self._length() < QUEUE_LIMIT:
                self._waiting.append(QueuedChange(change, loop, future, gives_up))
                self._changed.notify()
                return future
        if not alone:
            self._metrics.lost.inc()
        future.set_exception(absent("it is closed, or too many changes wait for it"))
        return future

    def close(self) -> None:
        """Commit what is queued and end the thread. Blocks; gives up what the database's absence
        keeps from being committed within CLOSE_SECONDS."""
        with self._changed:
            if self._closed_at is None:
                self._closed_at = time.monotonic()
            self._changed.notify()
        self._thread.join()

    def _length(self) -> int:
        return len(self._waiting) + len(self._group)

    def _run(self) -> None:
        while group := self._next():
            outcomes = self._outlast([job.change for job in group])
            with self._changed:
                self._group = []
            _tell(zip(group, outcomes, strict=True))

    def _next(self) -> list[QueuedChange]:
        """What shares the next transaction; empty when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed_at is not None)
            while self._waiting and len(self._group) < GROUP_LIMIT:
                alone = self._waiting[0].gives_up is not None
                if alone and self._group:
                    break
                self._group.append(self._waiting.popleft())
                if alone:
                    break
            return list(self._group)

    def _outlast(self, changes: list[Change]) -> list[ChangeOutcome]:
        """Commit the group's changes, waiting for a database that is away."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                outcomes = self._transactions.commit(changes)
            except Exception as error:
                if not passes(error):
                    return [ChangeOutcome(error=error)] * len(changes)
                if pause == _FIRST_PAUSE:
                    logger.warning("the database is away, changes wait for it: %s", error)
                if self._too_late():
                    return self._given_up(len(changes))
            else:
                self._metrics.commit_seconds.observe(time.monotonic() - began)
                if pause != _FIRST_PAUSE:
                    logger.warning("the database is back")
                return outcomes
            self._expire()
            with self._changed:
                self._changed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _too_late(self) -> bool:
        now = time.monotonic()
        gives_up = self._group[0].gives_up
        if gives_up is not None and now > gives_up:
            return True
        return self._closed_at is not None and now > self._closed_at + CLOSE_SECONDS

    def _given_up(self, count: int) -> list[ChangeOutcome]:
        if self._group[0].gives_up is None:
            logger.error("%d records are lost: the database stays away", count)
            self._metrics.lost.inc(count)
        return [ChangeOutcome(error=absent("it does not answer"))] * count

    def _expire(self) -> None:
        """Fail those behind the group that have waited long enough for the database."""
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._waiting if job.gives_up is not None and now > job.gives_up]
            if late:
                gone = set(late)
                self._waiting = deque(job for job in self._waiting if job not in gone)
        _tell((job, ChangeOutcome(error=absent("it does not answer"))) for job in late)


def absent(reason: str) -> UnavailableError:
    """What those are told who wait for a database that is away."""
    return UnavailableError(
        f"the database can't be reached: {reason}; try again shortly", retry_after=5.0
    )


def _tell(told: Iterable[tuple[QueuedChange, ChangeOutcome]]) -> None:
    """Resolve futures on their loops: one wake-up a loop, however many they are."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[QueuedChange, ChangeOutcome]]] = (
        defaultdict(list)
    )
    for job, outcome in told:
        by_loop[job.loop].append((job, outcome))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("%d changes were committed after their event loop closed", len(pairs))


def _resolve(pairs: list[tuple[QueuedChange, ChangeOutcome]]) -> None:
    for job, outcome in pairs:
        if job.future.done():  # cancelled: whoever waited has gone
            continue
        if outcome.error is None:
            job.future.set_result(outcome.value)
        elif isinstance(outcome.error, StopIteration):  # asyncio takes none
            job.future.set_exception(RuntimeError(f"the change raised {outcome.error!r}"))
        else:
            job.future.set_exception(outcome.error)
