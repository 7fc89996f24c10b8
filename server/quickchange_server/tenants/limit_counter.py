"""Counter of API keys' limits for all replicas of a cluster, and the messages that it takes.

A replica sends one message after another: what of its requests has ended, and which ask to be
admitted. Windows run on this counter's clock alone. What it holds is soft: to a counter that
doesn't know it, or that may have missed a message, a replica tells all that it was admitted in the
last minute and all that runs. Knows nothing of what carries the messages.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from quickchange_server.tenants.key import Limits
from quickchange_server.tenants.limits import (
    MINUTE,
    SECOND,
    Admitted,
    Clock,
    LimitedError,
    Limiter,
)

LEASE = 10 * SECOND  # a replica silent for so long is taken for dead


@dataclass(frozen=True, slots=True)
class ToAdmit:
    """A request that its replica asks to admit, under a number that the replica gives it."""

    number: int
    key: str
    limits: Limits
    tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended; `tokens` is None if it did not run."""

    number: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Past:
    """A request that was admitted before, of the last minute or still running."""

    key: str
    age: int  # nanoseconds, on its replica's clock
    tokens: int
    number: int | None  # None: it has ended


@dataclass(frozen=True, slots=True)
class LimitMessage:
    """One message of a replica, numbered in turn. `past` replaces all that was told before."""

    replica: str
    number: int
    past: tuple[Past, ...] | None = None
    ended: tuple[Ended, ...] = ()
    asked: tuple[ToAdmit, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """What LimitedError is made of."""

    limit: str
    most: int
    retry_after: float  # seconds

    def error(self) -> LimitedError:
        return LimitedError(self.limit, self.most, self.retry_after)


@dataclass(frozen=True, slots=True)
class Reply:
    """The requests that were refused, by number; None: the replica must tell its past first, and
    nothing was done."""

    refused: Mapping[int, Refusal] | None


@dataclass(slots=True)
class _Replica:
    """What is known of one replica. `heard` is when it last spoke."""

    number: int  # of its last message
    heard: int
    running: dict[int, Admitted] = field(default_factory=dict)
    alive: bool = True


class LimitCounter:
    """The counter. Its limits are exact for all that it was told."""

    def __init__(self, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._limiter = Limiter(clock)
        self._replicas: dict[str, _Replica] = {}

    def exchange(self, message: LimitMessage) -> Reply:
        """Take in what a replica tells, and decide on what it asks."""
        self._release_silent()
        replica = self._replicas.get(message.replica)
        if replica is not None and message.number <= replica.number:
            return Reply(None)  # late: its sender has given up on it, and told its past since
        if message.past is not None:
            replica = self._anew(message, message.past)
        elif replica is None or not replica.alive or message.number != replica.number + 1:
            return Reply(None)
        replica.number, replica.heard = message.number, self._clock()
        for ended in message.ended:
            self._end(replica.running.pop(ended.number, None), ended.tokens)
        return Reply(self._decide(message, replica))

    def _decide(self, message: LimitMessage, replica: _Replica) -> dict[int, Refusal]:
        refused = {}
        for ask in message.asked:
            try:
                admitted = self._limiter.charge(ask.key, ask.limits, ask.tokens, message.replica)
            except LimitedError as error:
                refused[ask.number] = Refusal(error.limit, error.most, error.retry_after or 0.0)
            else:
                replica.running[ask.number] = admitted
        return refused

    def _end(self, admitted: Admitted | None, tokens: int | None) -> None:
        if admitted is None:
            return  # its key had no limit to ask for
        if tokens is None:
            self._limiter.undo(admitted)
        else:
            self._limiter.end(admitted, tokens)

    def _anew(self, message: LimitMessage, past: tuple[Past, ...]) -> _Replica:
        """The replica with all that it tells, in place of what was known of it."""
        known = self._replicas.get(message.replica)
        if known is not None:
            self._release(known)
            self._limiter.disown(message.replica)
        replica = self._replicas[message.replica] = _Replica(message.number, self._clock())
        for told in past:
            admitted = self._limiter.adopt(told.key, told.age, told.tokens, message.replica)
            if told.number is None:
                self._limiter.end(admitted, told.tokens)
            else:
                replica.running[told.number] = admitted
        return replica

    def _release_silent(self) -> None:
        """Take requests of silent replicas for ended, with all that they might use as used."""
        now = self._clock()
        for name, replica in list(self._replicas.items()):
            if replica.heard + LEASE <= now:
                self._release(replica)
                replica.alive = False
            if replica.heard + LEASE + MINUTE <= now:  # no window holds anything of it
                del self._replicas[name]

    def _release(self, replica: _Replica) -> None:
        for admitted in replica.running.values():
            self._limiter.end(admitted, admitted.tokens)
        replica.running.clear()
