"""An admitted sequence, the tokens it has emitted, and the stream from which they are read.

After an engine's restart it is submitted again with the tokens emitted so far. Processes, the
timing of restarts and HTTP are not known here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from quickchange_server.engine_client.client_observer import Outcome, SequenceObserver
from quickchange_server.errors import (
    AdapterFailedError,
    AdapterWeightsError,
    EngineFailedError,
    QuickchangeError,
    RequestFailedError,
)
from quickchange_server.protocol import Delta, Submit

TELLING_TOKENS = 4
TELLING_DRAFTED_TOKENS = 20

# A sequence's index in its request, and its next delta or the error that ended it.
Mail = tuple[int, Delta | QuickchangeError]


class InFlightRequest:
    """A sequence between admission and its last delta, the `index`-th of its request.

    `submission_id` is the engine's id for it, None while no engine has it. Each submission gets a
    new one, so that late deltas of an earlier submission are recognised.
    """

    def __init__(
        self,
        submit: Submit,
        metrics: SequenceObserver,
        mailbox: asyncio.Queue[Mail],
        index: int = 0,
        drafter: str | None = None,
        later: deque[InFlightRequest] | None = None,
    ) -> None:
        """`drafter`: the name of the adapter whose draft heads are used; `later`: sequences of the
        same request that are not in the queue yet."""
        self.submit = submit
        self.metrics = metrics
        self.emitted: list[int] = []
        self.submission_id: str | None = None
        self.begun = False  # the engine that has it has begun to work on it
        self.deaths = 0  # engines that died while they had it, since it last got on
        self.suspect = False  # runs alone, until it has got on or has ended
        self.resumed_at = 0  # len(emitted) at the last submission
        self.finished = False
        self.submissions = 0
        self._mailbox = mailbox
        self._index = index
        self._drafter = drafter
        self.later: deque[InFlightRequest] = deque() if later is None else later

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def runs(self) -> bool:
        """True once an engine is known to have begun with it."""
        return self.begun or self.metrics.started

    @property
    def progress(self) -> int:
        """Tokens emitted since the last submission."""
        return len(self.emitted) - self.resumed_at

    @property
    def telling(self) -> int:
        """Tokens whose emission tells that it is past a certain point.

        An engine is at most one step ahead of the tokens received, and a step emits one token and
        the accepted drafts, whose number differs from run to run.
        """
        return TELLING_TOKENS if self.submit.drafting is None else TELLING_DRAFTED_TOKENS

    @property
    def is_new(self) -> bool:
        """True while it may be at its first steps."""
        return len(self.emitted) < self.telling

    def next_submission(self) -> Submit:
        """A submission that continues exactly where the stream stands, with a new id."""
        self.submissions += 1
        self.begun = False
        self.resumed_at = len(self.emitted)
        again = f"/{self.submissions}" if self.submissions > 1 else ""
        self.submission_id = self.request_id + again
        output = (*self.submit.output, *self.emitted)
        return replace(self.submit, request_id=self.submission_id, output=output)

    def count_death(self) -> None:
        """Count the death of an engine that had it. Those before it last got on count no more."""
        self.deaths = 1 if self.progress >= self.telling else self.deaths + 1

    def deliver(self, delta: Delta, now: float) -> None:
        """Take a delta from the engine. `now`: monotonic seconds, for the metrics."""
        if delta.finish_reason == "error":
            self.fail(_error_of(delta, self.submit, self._drafter), now)
            return
        if self.submissions > 1:
            delta = self._without_repeats(delta)
        self.emitted.extend(delta.token_ids)
        self.metrics.delta(delta, now)
        self._mailbox.put_nowait((self._index, delta))
        if delta.finish_reason is not None:
            self.end(delta.finish_reason, now)

    def fail(self, error: QuickchangeError, now: float) -> None:
        """End the sequence with `error`, which its reader receives."""
        self._mailbox.put_nowait((self._index, error))
        self.end(_outcome_of(error), now)

    def end(self, outcome: Outcome, now: float) -> None:
        """Mark the sequence as complete, failed or abandoned; no delta follows."""
        self.finished = True
        self.metrics.end(outcome, now)

    def _without_repeats(self, delta: Delta) -> Delta:
        """A resubmission's delta under the request's own id, without first-delta fields that an
        earlier submission has delivered."""
        delivered = self.metrics.started
        return delta._replace(
            request_id=self.request_id,
            cached_tokens=None if delivered else delta.cached_tokens,
            queue_seconds=None if delivered else delta.queue_seconds,
            prompt_logprobs=() if delivered else delta.prompt_logprobs,
        )


class DeltaStream:
    """The deltas of one request's sequences, in order of arrival; read by one task.

    The last delta of a sequence carries `finish_reason`; nothing follows the last of all. The
    reader calls `close` when it stops reading, for whatever reason, which frees the engine's
    resources.
    """

    def __init__(
        self,
        requests: Sequence[InFlightRequest],
        mailbox: asyncio.Queue[Mail],
        leave: Callable[[InFlightRequest, Outcome], None],
    ) -> None:
        self._requests = requests
        self._mailbox = mailbox
        self._leave = leave

    def receive(self) -> Coroutine[Any, Any, Mail]:
        """Wait for the next delta of any sequence, or for the error that ended one:
        AdapterFailedError, RequestFailedError, EngineFailedError or UnavailableError."""
        return self._mailbox.get()

    def receive_now(self) -> Mail | None:
        """What `receive` would return at once; None where it would wait."""
        return None if self._mailbox.empty() else self._mailbox.get_nowait()

    def stop(self, index: int) -> None:
        """End a sequence whose text has met a stop string, counted as "stop"."""
        self._end(self._requests[index], "stop")

    def close(self) -> None:
        """End all sequences that still run or wait, counted as "cancelled"."""
        for request in self._requests:
            request.later.clear()
        for request in self._requests:
            self._end(request, "cancelled")

    def _end(self, request: InFlightRequest, outcome: Outcome) -> None:
        if not request.finished:
            self._leave(request, outcome)


def _error_of(delta: Delta, submit: Submit, drafter: str | None) -> QuickchangeError:
    message = delta.error or "the engine gave up this request and did not say why"
    match delta.error_kind:
        case "adapter":
            return AdapterFailedError(message + _turbo_remedy(submit, drafter))
        case "request":
            return RequestFailedError(message)
        case "weights":
            return AdapterWeightsError(message, param="adapters")
        case _:
            return EngineFailedError(message)


def _turbo_remedy(submit: Submit, drafter: str | None) -> str:
    """Advice for the client if the draft heads, and not one of its adapters, may have failed."""
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
