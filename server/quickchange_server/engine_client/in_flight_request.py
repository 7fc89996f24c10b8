"""One admitted request on its way: what it has emitted, and the stream its caller reads.

Knows nothing of processes, of restarts' timing or of HTTP: tokens are delivered to it, and it says
how it is to be submitted again with what it has already emitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from quickchange_server.errors import (
    AdapterFailedError,
    EngineFailedError,
    QuickchangeError,
    RequestFailedError,
)
from quickchange_server.observability.metrics import Outcome, RequestMetrics
from quickchange_server.protocol import (
    Component,
    Constraint,
    Delta,
    Drafting,
    Pooling,
    SamplingParams,
    Submit,
)


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine is asked for: one sequence."""

    request_id: str  # unique among the requests in flight
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[Component, ...] = ()  # empty: the plain base model
    label: str = "base"  # the adapter's name in metrics
    drafting: Drafting | None = None  # None: no token is drafted
    drafter: str | None = None  # the name, in metrics, of the adapter whose heads draft
    constraint: Constraint | None = None
    salt: str = ""
    background: bool = False
    pooling: Pooling | None = None
    seed: int = field(kw_only=True)  # as `Submit.seed`


class Flight:
    """A generation between admission and its last delta.

    `ticket` is the id under which the engine knows it now, a new one for each submission, so that
    a late delta of an earlier submission is told apart; None while no engine has it.
    """

    def __init__(self, generation: Generation, metrics: RequestMetrics) -> None:
        self.generation = generation
        self.metrics = metrics
        self.emitted: list[int] = []
        self.ticket: str | None = None
        self.deaths = 0  # engines that died while they had it
        self.cleared = False  # has shown alone that it gets past the point of the last death
        self.boarded_at = 0  # len(emitted) at the last submission
        self.finished = False
        self.submissions = 0
        self._mailbox: asyncio.Queue[Delta | QuickchangeError | None] = asyncio.Queue()

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def progress(self) -> int:
        """Tokens emitted since the last submission."""
        return len(self.emitted) - self.boarded_at

    def board(self) -> Submit:
        """The submission that goes on exactly where the stream stands, under a new ticket."""
        self.submissions += 1
        self.boarded_at = len(self.emitted)
        again = f"/{self.submissions}" if self.submissions > 1 else ""
        self.ticket = self.request_id + again
        generation = self.generation
        return Submit(
            request_id=self.ticket,
            prompt=generation.prompt,
            sampling=generation.sampling,
            adapters=generation.adapters,
            output=tuple(self.emitted),
            drafting=generation.drafting,
            constraint=generation.constraint,
            salt=generation.salt,
            background=generation.background,
            pooling=generation.pooling,
            seed=generation.seed,
        )

    def deliver(self, delta: Delta, now: float) -> None:
        """Take a delta of the engine. `now`: monotonic seconds, for the metrics."""
        if delta.finish_reason == "error":
            self.fail(_error_of(delta, self.generation), now)
            return
        if self.submissions > 1:
            delta = self._as_first_told(delta)
        self.emitted.extend(delta.token_ids)
        self.metrics.delta(delta, now)
        self._mailbox.put_nowait(delta)
        if delta.finish_reason is not None:
            self._end(delta.finish_reason, now)

    def fail(self, error: QuickchangeError, now: float) -> None:
        """End the stream with `error`, which its reader gets raised."""
        self._mailbox.put_nowait(error)
        self._end(_outcome_of(error), now)

    def abandon(self, outcome: Outcome, now: float) -> None:
        """End the stream because its reader wants no more."""
        self._mailbox.put_nowait(None)
        self._end(outcome, now)

    async def receive(self) -> Delta | None:
        """The next delta, or None after an `abandon`. Raises the error that ended the request."""
        item = await self._mailbox.get()
        if isinstance(item, QuickchangeError):
            raise item
        return item

    def _as_first_told(self, delta: Delta) -> Delta:
        """A resubmission's delta under the request's own id, without what was said before."""
        told = self.metrics.started
        return replace(
            delta,
            request_id=self.request_id,
            cached_tokens=None if told else delta.cached_tokens,
            queue_seconds=None if told else delta.queue_seconds,
            prompt_logprobs=() if told else delta.prompt_logprobs,
        )

    def _end(self, outcome: Outcome, now: float) -> None:
        self.finished = True
        self.metrics.end(outcome, now)


class DeltaStream:
    """The deltas of one request, as an asynchronous iterator; read by one task.

    The last delta carries `finish_reason`. A request that fails raises AdapterFailedError,
    RequestFailedError, EngineFailedError or UnavailableError. A reader that ends early calls
    `aclose` (or `stop`), which frees what the request holds in the engine; a read that is cancelled
    does the same by itself.
    """

    def __init__(self, flight: Flight, leave: Callable[[Flight, Outcome], None]) -> None:
        self._flight = flight
        self._leave = leave
        self._exhausted = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._exhausted:
            raise StopAsyncIteration
        try:
            delta = await self._flight.receive()
        except QuickchangeError:
            self._exhausted = True
            raise
        except BaseException:
            self._close("cancelled")
            raise
        if delta is None:
            raise StopAsyncIteration
        self._exhausted = delta.finish_reason is not None
        return delta

    def stop(self) -> None:
        """The reader has what it asked for (a stop string): ends the work, counted as "stop"."""
        self._close("stop")

    async def aclose(self) -> None:
        """The reader has gone away: ends the work, counted as "cancelled"."""
        self._close("cancelled")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _close(self, outcome: Outcome) -> None:
        self._exhausted = True
        if not self._flight.finished:
            self._leave(self._flight, outcome)


def _error_of(delta: Delta, generation: Generation) -> QuickchangeError:
    message = delta.error or "the engine gave up this request and did not say why"
    match delta.error_kind:
        case "adapter":
            return AdapterFailedError(message + _turbo_remedy(generation))
        case "request":
            return RequestFailedError(message)
        case _:
            return EngineFailedError(message)


def _turbo_remedy(generation: Generation) -> str:
    """What to do where it is not one of the adapters that failed, but the Turbo beside them."""
    heads = None if generation.drafting is None else generation.drafting.heads
    if heads is None or heads in {component.digest for component in generation.adapters}:
        return ""
    drafter = generation.drafter or heads
    return f'; the request loads the Turbo {drafter!r} as well, which turbo: "off" leaves out'


def _outcome_of(error: QuickchangeError) -> Outcome:
    match error:
        case AdapterFailedError():
            return "adapter_failed"
        case RequestFailedError():
            return "request_failed"
        case EngineFailedError():
            return "engine_failed"
        case _:
            return "unavailable"
