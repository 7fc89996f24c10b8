"""Rate limits of API keys on this replica: requests and tokens a minute, and concurrent requests.

Rates use a sliding window and not a token bucket, which would admit nearly twice the limit within
a minute: a full bucket and its refill. Times are integer nanoseconds, so that the end of a window
is exact. Requests' content, HTTP and storage are not known here.
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
CONCURRENCY_RETRY_SECONDS = 1.0  # a guess: the end of a running request can't be predicted

Clock = Callable[[], int]  # monotonic nanoseconds


@dataclass(slots=True)
class Taken:
    """An amount taken from a window at the time `at`."""

    at: int
    amount: int


class MinuteWindow:
    """Sliding window over the amounts taken in (now - 60 s, now]."""

    def __init__(self) -> None:
        self._taken: deque[Taken] = deque()  # oldest first
        self._total = 0

    def wait(self, now: int, amount: int, limit: int) -> int:
        """Nanoseconds until `amount` fits under `limit` if nothing else is taken; 0: now.

        Raises ValueError if `amount` exceeds `limit`.
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
        self._forget(now)  # without a limit, `wait` is never called
        taken = Taken(now, amount)
        self._taken.append(taken)
        self._total += amount
        return taken

    def settle(self, taken: Taken, used: int, now: int) -> None:
        """Return all but `used` of an amount taken, if it is still in the window."""
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
    """The windows and the running requests of one key."""

    requests: MinuteWindow = field(default_factory=MinuteWindow)
    tokens: MinuteWindow = field(default_factory=MinuteWindow)
    running: int = 0


@dataclass(frozen=True, slots=True)
class Admitted:
    """An admitted request, which counts against its key's limits until `Limiter.end`."""

    key: str
    request: Taken
    tokens: Taken


class LimitedError(RateLimitedError):
    """A limit has no room for the request now; `limit` is its field of Limits."""

    def __init__(self, limit: str, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit


class TooLargeError(InvalidRequestError):
    """The request exceeds a limit at any time; `limit` is its field of Limits."""

    def __init__(self, limit: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.limit = limit


class Limiter:
    """Limiter for all keys. Used on the event loop only."""

    def __init__(self, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    def admit(self, key: str, limits: Limits, prompt_tokens: int, new_tokens: int) -> Admitted:
        """Charge a request with the most tokens that it may use.

        Raises TooLargeError if it can never be admitted and LimitedError if it can't be now; then
        nothing is charged.
        """
        _check_size(limits, prompt_tokens, new_tokens)
        state, now = self._states.setdefault(key, _State()), self._clock()
        tokens = prompt_tokens + new_tokens
        _check_room(state, limits, now, tokens)
        state.running += 1
        return Admitted(key, state.requests.take(now, 1), state.tokens.take(now, tokens))

    def end(self, admitted: Admitted, tokens: int) -> None:
        """Settle a request that has ended and used `tokens` tokens."""
        state = self._states[admitted.key]
        state.running -= 1
        state.tokens.settle(admitted.tokens, tokens, self._clock())

    def undo(self, admitted: Admitted) -> None:
        """Return the whole charge of a request that did not run."""
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
    """Raise LimitedError if a limit has no room, naming the one with the longest wait."""
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
