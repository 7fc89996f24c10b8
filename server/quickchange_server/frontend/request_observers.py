"""Observers of requests: usage, experiments and traces keep books on what each request came to.

A bookkeeper is called when a request begins, where it may refuse it, and exactly once when the
request has ended, however it ended. Knows nothing of HTTP or storage.
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
from quickchange_server.protocol import SamplingParams, Submit

Ending = Literal["stop", "length", "cancelled", "refused", "failed"]
# Reason of an assignment; "state": the experiment is paused or stopped.
How = Literal["hash", "random", "list", "state"]

SETTLE_SECONDS = 10.0  # longest wait of an answer's end for its record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The variant of an experiment that a request got, and why."""

    experiment: str
    variant: str
    unit: str | None  # hash of what the assignment sticks to; None: drawn for this request alone
    by: How
    shadow: bool = False  # generated beside the answered request
    experiment_id: str = ""  # unlike the name, never reused
    stretch: int = 0  # index of the experiment's period of constant weights

    @property
    def counted(self) -> bool:
        """True if it was left to chance, so that results may count it."""
        return self.by in ("hash", "random")


@dataclass(frozen=True, slots=True)
class Opened:
    """A request that is about to be admitted."""

    request_id: str  # id of the client's answer
    caller: Caller
    model: str  # the client's own name for it
    label: str  # the adapter's name, or the catalog's labels for base and compositions
    prompt_tokens: int  # sum over prompts
    max_tokens: int  # limit of new tokens, sum over choices
    choices: int
    at: float  # Unix seconds
    assignment: Assignment | None = None
    user: str | None = None  # the body's field
    traceparent: str | None = None  # W3C trace context of the client
    http_id: str = ""  # `x-request-id` of the HTTP request
    digests: tuple[str, ...] = ()  # of the adapters
    sampling: SamplingParams | None = None  # as the client has it; None: nothing is generated
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """A request that has ended."""

    opened: Opened
    ending: Ending
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    first_token_seconds: float | None = None  # since `opened.at`
    seconds: float = 0.0
    queue_seconds: float = 0.0  # arrival in the engine to the first step; 0: none ran


class Bookkeeper(Protocol):
    """An observer of requests, called on the event loop; it must not block."""

    def opened(self, opened: Opened) -> Awaitable[None] | None:
        """Note that a request begins. It, or the awaitable, raises a QuickchangeError to refuse it;
        then, or if its wait is cancelled, nothing is noted."""

    def completed(self, completed: Completed) -> Awaitable[None] | None:
        """Record an ended request. The awaitable is done once the record is durable."""


class TokenRecord(Protocol):
    """The tokens of one request, as they come."""

    def add(self, token_ids: Sequence[int]) -> None:
        """Note tokens of the output."""

    def keep(self) -> None:
        """Keep the request, which has ended with all of its output."""


class TokenRecorder(Protocol):
    """Keeps the tokens of some requests; asked on the event loop, where it must not block."""

    def begin(self, opened: Opened, submit: Submit) -> TokenRecord | None:
        """The record of an admitted request, whose first choice is `submit`; None: none is made."""


class Counts(Protocol):
    """Counts of a request so far, summed over its choices."""

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
    async def open(cls, opened: Opened, keepers: Sequence[Bookkeeper]) -> Account:
        """Open the request in all books. If a bookkeeper raises, those before it get its end.

        Yields to other tasks only where a bookkeeper has to wait.
        """
        opened_in: list[Bookkeeper] = []
        for keeper in keepers:
            try:
                noted = keeper.opened(opened)
                if noted is not None:
                    await noted
            except asyncio.CancelledError:
                cls(opened, opened_in).end("cancelled")
                raise
            except QuickchangeError:
                cls(opened, opened_in).end("refused")
                raise
            opened_in.append(keeper)
        return cls(opened, opened_in)

    def token(self) -> None:
        """Note that text or tokens have come."""
        if self._first is None:
            self._first = time.monotonic() - self._began

    def end(self, ending: Ending, counts: Counts | None = None) -> None:
        """Record the request's end. Later calls have no effect."""
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
        """Wait until the records of `end` are durable, for `SETTLE_SECONDS` at most.

        A record that is lost, or still waits for an unavailable database, is logged and raises
        nothing, since the answer is complete.
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
