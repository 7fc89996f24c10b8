"""The writer thread, which makes all changes in order of submission; many share one commit.

While a commit waits for the disk, new changes queue up and share the next one: the higher the
load, the more a commit carries. A change that fails is rolled back alone. While the database is
unreachable, changes wait and are retried in order.

Tables are not known here.
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

from quickchange_server.errors import QuickchangeError, StorageFullError, UnavailableError
from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.outages import is_full, passes
from quickchange_server.storage.transactions import Change, ChangeOutcome, Transactions

QUEUE_LIMIT = 50_000  # waiting changes, some 1 KiB each
GROUP_LIMIT = 500  # changes of one transaction, which bounds the time it holds the write lock
WRITE_SECONDS = 10.0  # during an outage, until a change that a caller awaits is given up
CLOSE_SECONDS = 10.0  # during an outage, until closing gives up
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between tries

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class QueuedChange:
    """A change and the future of its caller."""

    change: Change
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    gives_up: float | None = None  # monotonic; None: a record, which shares commits, no deadline


class Writer:
    """The thread and its queue. `engine`: from `engines.writing`."""

    def __init__(self, engine: Engine, metrics: StorageMetrics) -> None:
        self._transactions = Transactions(engine)
        self._metrics = metrics
        self._waiting: deque[QueuedChange] = deque()
        self._group: list[QueuedChange] = []  # changes of the running transaction
        self._changed = threading.Condition()
        self._closed_at: float | None = None  # monotonic
        self._obstacle: Exception | None = None  # to the latest transaction that must be retried
        metrics.watch(self._length)
        self._thread = threading.Thread(target=self._run, name="database-writer", daemon=True)
        self._thread.start()

    def submit(self, change: Change, *, alone: bool) -> asyncio.Future[Any]:
        """Queue a change, on the event loop; the future is done after its commit.

        `alone`: in a transaction of its own, given up after WRITE_SECONDS without a database.
        If QUEUE_LIMIT changes wait, or after `close`, the future fails with UnavailableError.
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
        """Commit the queue and end the thread. Blocks; during an outage it gives up after
        CLOSE_SECONDS."""
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
            _resolve_all(zip(group, outcomes, strict=True))

    def _next(self) -> list[QueuedChange]:
        """The changes of the next transaction; empty when the writer is closed and done."""
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
        """Commit the group's changes, retrying while the database is unreachable."""
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                outcomes = self._transactions.commit(changes)
            except Exception as error:
                if not passes(error):
                    return [ChangeOutcome(error=error)] * len(changes)
                self._obstacle = error
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
        return [ChangeOutcome(error=unanswered(self._obstacle))] * count

    def _expire(self) -> None:
        """Fail the waiting changes whose deadline has passed."""
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._waiting if job.gives_up is not None and now > job.gives_up]
            if late:
                gone = set(late)
                self._waiting = deque(job for job in self._waiting if job not in gone)
        _resolve_all((job, ChangeOutcome(error=unanswered(self._obstacle))) for job in late)


def absent(reason: str) -> UnavailableError:
    """The error for callers while the database can't be reached."""
    return UnavailableError(
        f"the database can't be reached: {reason}; try again shortly", retry_after=5.0
    )


def unanswered(obstacle: Exception | None) -> QuickchangeError:
    """The error for callers whose change has waited too long for the database."""
    if is_full(obstacle):
        return StorageFullError(
            "the disk of the server's database is full, and nothing was changed; have its operator "
            "add space, or take old records away with `quickchange database prune`"
        )
    return absent("it does not answer")


def _resolve_all(resolved: Iterable[tuple[QueuedChange, ChangeOutcome]]) -> None:
    """Resolve futures on their event loops, with one wake-up for each loop."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[QueuedChange, ChangeOutcome]]] = (
        defaultdict(list)
    )
    for job, outcome in resolved:
        by_loop[job.loop].append((job, outcome))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:  # the loop is closed, so nothing awaits the futures
            logger.debug("%d changes were committed after their event loop closed", len(pairs))


def _resolve(pairs: list[tuple[QueuedChange, ChangeOutcome]]) -> None:
    for job, outcome in pairs:
        if job.future.done():  # cancelled by its caller
            continue
        if outcome.error is None:
            job.future.set_result(outcome.value)
        elif isinstance(outcome.error, StopIteration):  # futures refuse StopIteration
            job.future.set_exception(RuntimeError(f"the change raised {outcome.error!r}"))
        else:
            job.future.set_exception(outcome.error)
