"""Limits of API keys that hold over all replicas: a replica's side of the shared counter.

What the counter admitted is counted here as well. So this replica can go on alone, by its own
count, while the counter does not answer, and can tell a new counter all that it must know.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from quickchange_server.tenants.key import Limits
from quickchange_server.tenants.limit_counter import (
    Ended,
    LimitMessage,
    Past,
    Refusal,
    Reply,
    ToAdmit,
)
from quickchange_server.tenants.limits import Admitted, Clock, LimitedError, Limiter, check_size

ANSWER_SECONDS = 1.0  # longest wait for one answer of the counter
BEAT_SECONDS = 1.0  # between messages of a replica that has nothing to say

logger = logging.getLogger(__name__)


class CounterCalls(Protocol):
    """The way to the cluster's LimitCounter, wherever it runs."""

    async def exchange(self, message: LimitMessage) -> Reply:
        """What `LimitCounter.exchange` answers. May raise anything while there is no counter."""


@dataclass(slots=True)
class _Asked:
    """A request that waits to be admitted."""

    ask: ToAdmit
    answer: asyncio.Future[Admitted | LimitedError] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class SharedLimits:
    """Limits by the shared counter. Made and used on the event loop."""

    def __init__(
        self,
        calls: CounterCalls,
        counted_alone: Callable[[], None],
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """`counted_alone` is called for each request that the counter was not there to decide."""
        self._calls = calls
        self._counted_alone = counted_alone
        self._replica = secrets.token_hex(8)
        self._messages = count(1)
        self._requests = count(1)
        self._clock = clock
        self._mine = Limiter(clock)
        self._running: dict[Admitted, int] = {}  # their numbers
        self._asked: list[_Asked] = []
        self._ended: list[Ended] = []
        self._known = False  # the counter has all that was told so far
        self._alone = False  # the counter did not answer last
        self._wake = asyncio.Event()
        self._talk = asyncio.create_task(self._talking(), name="limits")

    async def admit(
        self, key: str, limits: Limits, prompt_tokens: int, new_tokens: int
    ) -> Admitted:
        """Charge a request with the most tokens that it may use.

        Raises TooLargeError if it can never be admitted and LimitedError if it can't be now; then
        nothing is charged. Waits for the counter, for twice ANSWER_SECONDS at most.
        """
        check_size(limits, prompt_tokens, new_tokens)
        ask = ToAdmit(next(self._requests), key, limits, prompt_tokens + new_tokens)
        if not limits.of_several_requests:
            return self._begin(ask)
        if self._alone:
            return self._by_own_count(ask)
        asked = _Asked(ask)
        self._asked.append(asked)
        self._wake.set()
        try:
            answer = await asked.answer
        except asyncio.CancelledError:
            if not asked.answer.cancelled() and isinstance(
                admitted := asked.answer.result(), Admitted
            ):
                self.undo(admitted)
            raise
        if isinstance(answer, LimitedError):
            raise answer
        return answer

    def end(self, admitted: Admitted, tokens: int) -> None:
        """Settle a request that has ended and used `tokens` tokens."""
        self._mine.end(admitted, tokens)
        self._tell(Ended(self._running.pop(admitted), tokens))

    def undo(self, admitted: Admitted) -> None:
        """Return the whole charge of a request that did not run."""
        self._mine.undo(admitted)
        self._tell(Ended(self._running.pop(admitted), None))

    async def close(self) -> None:
        """Tell the counter what has ended, so that it need not wait for the silent."""
        self._talk.cancel()
        await asyncio.wait([self._talk])
        await self._exchange()

    async def _talking(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            await self._exchange()

    async def _exchange(self) -> None:
        """Send one message and take its answer. One is under way at a time, so that they come in
        order, and those that ask meanwhile share the next."""
        asked = [each for each in self._asked if not each.answer.done()]
        self._asked.clear()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                refused = await self._send(tuple(each.ask for each in asked))
        except BaseException as error:  # a transport, or a counter that died, may raise anything
            self._lost(asked, error)
            if not isinstance(error, Exception):
                raise
            return
        if self._alone:
            self._alone = False
            logger.info("the counter of API keys' limits answers again")
        for each in asked:
            refusal = refused.get(each.ask.number)
            if refusal is not None:
                self._answer(each, refusal.error())
            else:
                self._answer(each, self._begin(each.ask))

    async def _send(self, asked: tuple[ToAdmit, ...]) -> Mapping[int, Refusal]:
        """The counter's refusals. It is told the past if it asks for it."""
        while True:
            past = None if self._known else tuple(self._past())
            ended = () if past is not None else tuple(self._ended)
            self._ended.clear()
            self._known = True  # until something happens that no message tells
            message = LimitMessage(self._replica, next(self._messages), past, ended, asked)
            reply = await self._calls.exchange(message)
            if reply.refused is not None:
                return reply.refused
            self._known = False

    def _past(self) -> Iterator[Past]:
        now = self._clock()
        for admitted, number in self._running.items():
            yield Past(admitted.key, now - admitted.at, admitted.tokens, number)
        for admitted, age in self._mine.past():
            if admitted.requests and admitted not in self._running:
                yield Past(admitted.key, age, admitted.tokens, None)

    def _lost(self, asked: Sequence[_Asked], error: BaseException) -> None:
        """Go on alone, since the counter may not know what was last told."""
        if not self._alone and isinstance(error, Exception):
            logger.warning(
                "the counter of API keys' limits does not answer (%s): until it does, this replica "
                "lets through as much as if it were the only one",
                type(error).__name__,
            )
        self._known, self._alone = False, True
        waiting = [*asked, *self._asked]
        self._asked.clear()
        for each in waiting:
            try:
                self._answer(each, self._by_own_count(each.ask))
            except LimitedError as refusal:
                self._answer(each, refusal)

    def _by_own_count(self, ask: ToAdmit) -> Admitted:
        """Admit a request without the counter. Raises LimitedError."""
        self._counted_alone()
        self._known = False
        admitted = self._mine.charge(ask.key, ask.limits, ask.tokens)
        self._running[admitted] = ask.number
        return admitted

    def _begin(self, ask: ToAdmit) -> Admitted:
        """Count a request that the counter admitted, or that has no limit to ask for."""
        admitted = self._mine.adopt(ask.key, 0, ask.tokens)
        self._running[admitted] = ask.number
        return admitted

    def _answer(self, asked: _Asked, answer: Admitted | LimitedError) -> None:
        if not asked.answer.done():
            asked.answer.set_result(answer)
        elif isinstance(answer, Admitted):  # whoever asked has gone
            self.undo(answer)

    def _tell(self, ended: Ended) -> None:
        self._ended.append(ended)
        if not self._alone:
            self._wake.set()
