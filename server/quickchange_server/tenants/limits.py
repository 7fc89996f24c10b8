"""Limits of keys on this replica: requests and tokens of any minute, and requests at once.

A sliding window and not a token bucket: a bucket that holds a minute's worth lets nearly twice the
limit through within a minute, the burst and what flows in beside it. Times are whole nanoseconds,
so that the end of a window is exact. Knows nothing of requests' content, HTTP or storage.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quickchange_server.errors import InvalidRequestError, RateLimitedError
from quickchange_server.tenants.key import Limits

SECOND = 10**9  # nanoseconds
MINUTE = 60 * SECOND
CONCURRENCY_RETRY_SECONDS = 1.0  # when a running request ends isn't known

Clock = Callable[[], int]  # monotonic nanoseconds


@dataclass(slots=True)
class Taken:
    """An amount taken from a window at a time."""

    at: int
    amount: int


class MinuteWindow:
    """What was taken in the last minute: [now - 60 s, now], its older end not included."""

    def __init__(self) -> None:
        self._taken: deque[Taken] = deque()  # oldest first
        self._total = 0

    def wait(self, now: int, amount: int, limit: int) -> int:
        """Nanoseconds until `amount` fits under `limit`, if nobody else takes any; 0: now.

        `amount` must not exceed `limit`.
        """
        self._forget(now)
        over = self._total + amount - limit
        if over <= 0:
            return 0
        for taken in self._taken:
            over -= taken.amount
            if over <= 0:
                return taken.at + MINUTE - now
        raise ValueError(f"{amount} never fits under {limit}")

    def take(self, now: int, amount: int) -> Taken:
        self._forget(now)  # where nothing is limited nobody asks to `wait`
        taken = Taken(now, amount)
        self._taken.append(taken)
        self._total += amount
        return taken

    def settle(self, taken: Taken, used: int, now: int) -> None:
        """Keep `used` of what was taken; of what the window has forgotten nothing comes back."""
        self._forget(now)
        if taken.at + MINUTE > now:
            back = max(0, taken.amount - used)
            taken.amount -= back
            self._total -= back

    def _forget(self, now: int) -> None:
        while self._taken and self._taken[0].at + MINUTE <= now:
            self._total -= self._taken.popleft().amount


@dataclass(slots=True)
class _State:
    """Of one key."""

    requests: MinuteWindow = field(default_factory=MinuteWindow)
    tokens: MinuteWindow = field(default_factory=MinuteWindow)
    running: int = 0


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that counts against its key's limits until `Limiter.end`."""

    key: str
    request: Taken
    tokens: Taken


class LimitedError(RateLimitedError):
    """`limit` is the field of Limits that there is no room under now."""

    def __init__(self, limit: str, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit


class TooLargeError(InvalidRequestError):
    """`limit` is the field of Limits that this request exceeds at any time."""

    def __init__(self, limit: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.limit = limit


class Limiter:
    """All keys' state. On the event loop alone."""

    def __init__(self, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    def admit(self, key: str, limits: Limits, prompt_tokens: int, new_tokens: int) -> Admitted:
        """Charge a request with all the tokens that it may take.

        Raises TooLargeError where it can never be admitted and LimitedError where it can't be now;
        nothing is charged then.
        """
        _check_size(limits, prompt_tokens, new_tokens)
        state, now = self._states.setdefault(key, _State()), self._clock()
        tokens = prompt_tokens + new_tokens
        _check_room(state, limits, now, tokens)
        state.running += 1
        return Admitted(key, state.requests.take(now, 1), state.tokens.take(now, tokens))

    def end(self, admitted: Admitted, tokens: int) -> None:
        """The request has ended and took so many tokens."""
        state = self._states[admitted.key]
        state.running -= 1
        state.tokens.settle(admitted.tokens, tokens, self._clock())

    def undo(self, admitted: Admitted) -> None:
        """The request did not run after all."""
        self.end(admitted, 0)
        self._states[admitted.key].requests.settle(admitted.request, 0, self._clock())


def _check_size(limits: Limits, prompt_tokens: int, new_tokens: int) -> None:
    most = limits.max_prompt_tokens
    if most is not None and prompt_tokens > most:
        raise TooLargeError(
            "max_prompt_tokens",
            f"the prompt has {prompt_tokens} tokens, and this API key's max_prompt_tokens is "
            f"{most}; shorten it",
        )
    most = limits.max_new_tokens
    if most is not None and new_tokens > most:
        raise TooLargeError(
            "max_new_tokens",
            f"max_tokens: up to {new_tokens} new tokens were asked for, all choices together, and "
            f"this API key's max_new_tokens is {most}; lower max_tokens or n",
            "max_tokens",
        )
    most = limits.tokens_per_minute
    if most is not None and prompt_tokens + new_tokens > most:
        raise TooLargeError(
            "tokens_per_minute",
            f"max_tokens: this request may take {prompt_tokens + new_tokens} tokens ("
            f"{prompt_tokens} of prompt), more than this API key may take in a minute, {most}; "
            "lower max_tokens or shorten the prompt",
            "max_tokens",
        )


def _check_room(state: _State, limits: Limits, now: int, tokens: int) -> None:
    """Raise LimitedError that names the limit which has no room for the longest."""
    waits: dict[str, float] = {}
    if limits.concurrent_requests is not None and state.running >= limits.concurrent_requests:
        waits["concurrent_requests"] = CONCURRENCY_RETRY_SECONDS
    if limits.requests_per_minute is not None:
        wait = state.requests.wait(now, 1, limits.requests_per_minute)
        waits["requests_per_minute"] = wait / SECOND
    if limits.tokens_per_minute is not None:
        wait = state.tokens.wait(now, tokens, limits.tokens_per_minute)
        waits["tokens_per_minute"] = wait / SECOND
    if not any(waits.values()):
        return
    limit = max(waits, key=lambda name: waits[name])
    raise LimitedError(
        limit,
        f"this API key's limit {limit}, {getattr(limits, limit)}, is reached; "
        f"try again in {waits[limit]:.1f} s",
        waits[limit],
    )
