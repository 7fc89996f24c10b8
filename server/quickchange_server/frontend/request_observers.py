"""What each request came to, for those who keep books: usage, experiments, traces.

A bookkeeper is told when a request begins, and may refuse it there; and once when it has ended,
however it ended. Knows nothing of HTTP or storage.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.caller import Caller

Ending = Literal["stop", "length", "cancelled", "refused", "failed"]
How = Literal["hash", "random", "list", "state"]  # of an assignment; state: paused or stopped

SETTLE_SECONDS = 10.0  # that the end of an answer waits for its record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which variant of an experiment a request got, and why."""

    experiment: str
    variant: str
    unit: str | None  # what the assignment sticks to, hashed; None: drawn for this request alone
    by: How
    shadow: bool = False  # computed beside the request that was answered
    experiment_id: str = ""  # unlike its name never used twice
    stretch: int = 0  # which of the experiment's times of constant weights

    @property
    def counted(self) -> bool:
        """Whether it was left to chance, so that results may count it."""
        return self.by in ("hash", "random")


@dataclass(frozen=True, slots=True)
class Opened:
    """A request that is about to be admitted."""

    request_id: str  # the completion's id, as the client sees it
    caller: Caller
    model: str  # as the client named it
    label: str  # the adapter's name, or the catalog's labels for base and compositions
    prompt_tokens: int  # of all prompts
    max_tokens: int  # new tokens at most, of all choices
    choices: int
    at: float  # Unix seconds
    assignment: Assignment | None = None
    user: str | None = None  # the request's field
    traceparent: str | None = None  # W3C trace context of the client


@dataclass(frozen=True, slots=True)
class Completed:
    """How it ended."""

    opened: Opened
    ending: Ending
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    first_token_seconds: float | None = None  # from `opened.at`
    seconds: float = 0.0
    queue_seconds: float = 0.0  # from arrival in the engine to the first step; 0: it had none


class Bookkeeper(Protocol):
    """Called on the event loop; nothing here waits."""

    def opened(self, opened: Opened) -> None:
        """A request begins. Raises a QuickchangeError to refuse it."""

    def completed(self, completed: Completed) -> Awaitable[None] | None:
        """It has ended. What is returned is done once the record can't be lost any more."""


class Counts(Protocol):
    """What a request has come to so far; tokens of all its choices."""

    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def queue_seconds(self) -> float: ...


class Account:
    """One request's entry in all books, from `open` to exactly one end."""

    def __init__(self, opened: Opened, keepers: Sequence[Bookkeeper]) -> None:
        self.opened = opened
        self._keepers = keepers
        self._began = time.monotonic()
        self._first: float | None = None
        self._durable: list[asyncio.Future[None]] | None = None  # None: not ended

    @classmethod
    def open(cls, opened: Opened, keepers: Sequence[Bookkeeper]) -> Account:
        """Tell every bookkeeper. Raises what one refuses with; those told before get the end."""
        told: list[Bookkeeper] = []
        for keeper in keepers:
            try:
                keeper.opened(opened)
            except QuickchangeError:
                cls(opened, told).end("refused")
                raise
            told.append(keeper)
        return cls(opened, told)

    def token(self) -> None:
        """Text or tokens have come."""
        if self._first is None:
            self._first = time.monotonic() - self._began

    def end(self, ending: Ending, counts: Counts | None = None) -> None:
        """The request has ended. Later calls change nothing."""
        if self._durable is not None:
            return
        completed = Completed(
            self.opened,
            ending,
            completion_tokens=0 if counts is None else counts.completion_tokens,
            cached_tokens=0 if counts is None else counts.cached_tokens,
            drafted_tokens=0 if counts is None else counts.drafted_tokens,
            accepted_tokens=0 if counts is None else counts.accepted_tokens,
            first_token_seconds=self._first,
            seconds=time.monotonic() - self._began,
            queue_seconds=0.0 if counts is None else counts.queue_seconds,
        )
        kept = [keeper.completed(completed) for keeper in self._keepers]
        self._durable = [asyncio.ensure_future(future) for future in kept if future is not None]

    async def settled(self) -> None:
        """Wait until the books hold what `end` told, at most for a while.

        A record that is lost, or still waits for a database that is away, is logged: the answer is
        complete, and its client is to have it.
        """
        if not self._durable:
            return
        done, waiting = await asyncio.wait(self._durable, timeout=SETTLE_SECONDS)
        for kept in done:
            error = kept.exception()
            if error is not None:
                logger.error(
                    "the record of request %s is lost", self.opened.request_id, exc_info=error
                )
        if waiting:
            logger.warning(
                "request %s ended before its record was on disk; it is still to be written",
                self.opened.request_id,
            )
