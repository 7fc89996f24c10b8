"""One admitted sequence on its way: what it has emitted, and where its reader gets it from.

Knows nothing of processes, of restarts' timing or of HTTP: tokens are delivered to it, and it says
how it is to be submitted again with what it has already emitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from quickchange_server.engine_client.client_observer import Outcome, SequenceObserver
from quickchange_server.errors import (
    AdapterFailedError,
    EngineFailedError,
    QuickchangeError,
    RequestFailedError,
)
from quickchange_server.protocol import Delta, Submit

# What comes for the sequences of one request, in order: a sequence's index, and its next delta or
# the error that has ended it.
Mail = tuple[int, Delta | QuickchangeError]


class Flight:
    """A sequence between admission and its last delta, the `index`-th of its request.

    `ticket` is the id under which the engine knows it now, a new one for each submission, so that
    a late delta of an earlier submission is told apart; None while no engine has it.
    """

    def __init__(
        self,
        submit: Submit,
        metrics: SequenceObserver,
        mailbox: asyncio.Queue[Mail],
        index: int = 0,
        drafter: str | None = None,
    ) -> None:
        """drafter: the name of the adapter whose heads draft."""
        self.submit = submit
        self.metrics = metrics
        self.emitted: list[int] = []
        self.ticket: str | None = None
        self.deaths = 0  # engines that died while they had it
        self.cleared = False  # has shown alone that it gets past the point of the last death
        self.boarded_at = 0  # len(emitted) at the last submission
        self.finished = False
        self.submissions = 0
        self._mailbox = mailbox
        self._index = index
        self._drafter = drafter

    @property
    def request_id(self) -> str:
        return self.submit.request_id

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
        return replace(self.submit, request_id=self.ticket, output=tuple(self.emitted))

    def deliver(self, delta: Delta, now: float) -> None:
        """Take a delta of the engine. `now`: monotonic seconds, for the metrics."""
        if delta.finish_reason == "error":
            self.fail(_error_of(delta, self.submit, self._drafter), now)
            return
        if self.submissions > 1:
            delta = self._as_first_told(delta)
        self.emitted.extend(delta.token_ids)
        self.metrics.delta(delta, now)
        self._mailbox.put_nowait((self._index, delta))
        if delta.finish_reason is not None:
            self.end(delta.finish_reason, now)

    def fail(self, error: QuickchangeError, now: float) -> None:
        """End the sequence with `error`, which its reader raises."""
        self._mailbox.put_nowait((self._index, error))
        self.end(_outcome_of(error), now)

    def end(self, outcome: Outcome, now: float) -> None:
        """Nothing more is delivered: it is complete, has failed, or its reader wants no more."""
        self.finished = True
        self.metrics.end(outcome, now)

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


class DeltaStream:
    """The deltas of one request's sequences, in order of arrival; read by one task.

    The last delta of a sequence carries `finish_reason`; nothing comes after the last of all. The
    reader calls `close` when it reads no further, for whatever reason: that frees what the request
    still holds in the engine.
    """

    def __init__(
        self,
        flights: Sequence[Flight],
        mailbox: asyncio.Queue[Mail],
        leave: Callable[[Flight, Outcome], None],
    ) -> None:
        self._flights = flights
        self._mailbox = mailbox
        self._leave = leave

    def receive(self) -> Coroutine[Any, Any, Mail]:
        """Wait for the next delta of any sequence, or for the error that has ended one:
        AdapterFailedError, RequestFailedError, EngineFailedError or UnavailableError."""
        return self._mailbox.get()

    def stop(self, index: int) -> None:
        """End a sequence that has what was asked for (a stop string), counted as "stop"."""
        self._end(self._flights[index], "stop")

    def close(self) -> None:
        """End all sequences that still run, counted as "cancelled"."""
        for flight in self._flights:
            self._end(flight, "cancelled")

    def _end(self, flight: Flight, outcome: Outcome) -> None:
        if not flight.finished:
            self._leave(flight, outcome)


def _error_of(delta: Delta, submit: Submit, drafter: str | None) -> QuickchangeError:
    message = delta.error or "the engine gave up this request and did not say why"
    match delta.error_kind:
        case "adapter":
            return AdapterFailedError(message + _turbo_remedy(submit, drafter))
        case "request":
            return RequestFailedError(message)
        case _:
            return EngineFailedError(message)


def _turbo_remedy(submit: Submit, drafter: str | None) -> str:
    """What to do where it is not one of the adapters that failed, but the Turbo beside them."""
    heads = None if submit.drafting is None else submit.drafting.heads
    if heads is None or heads in {component.digest for component in submit.adapters}:
        return ""
    return (
        f'; the request loads the Turbo {drafter or heads!r} as well, which turbo: "off" leaves out'
    )


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
