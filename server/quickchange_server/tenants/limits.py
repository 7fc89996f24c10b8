"""Rate limits of API keys: requests and tokens a minute, and concurrent requests, counted exactly.

Rates use a sliding window and not a token bucket, which would admit nearly twice the limit within
a minute: a full bucket and its refill. Times are integer nanoseconds, so that the end of a window
is exact. Requests' content, HTTP and storage are not known here.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quickchange_server.errors import InvalidRequestError, RateLimitedError
from quickchange_server.tenants.key import Limits

SECOND = 10**9  # nanoseconds
MINUTE = 60 * SECOND
CONCURRENCY_RETRY_SECONDS = 1.0  # a guess: the end of a running request can't be predicted

Clock = Callable[[], int]  # monotonic nanoseconds


@dataclass(slots=True, eq=False)
class Admitted:
    """An admitted request, which counts against its key's limits until it has ended, and in the
    windows of its first minute with what it may use, or has used."""

    key: str
    at: int
    tokens: int
    owner: str = ""  # the replica whose request it is, where one counter serves several
    requests: int = 1  # 0: it did not run


@dataclass(slots=True)
class _State:
    """What one key was admitted in (now - 60 s, now], with its sums, and how many run."""

    past: deque[Admitted] = field(default_factory=deque)  # oldest first
    requests: int = 0
    tokens: int = 0
    running: int = 0

    def add(self, admitted: Admitted, now: int) -> None:
        self.forget(now)
        if admitted.at + MINUTE > now:
            if self.past and admitted.at < self.past[-1].at:
                insort(self.past, admitted, key=lambda each: each.at)
            else:
                self.past.append(admitted)
            self.requests += admitted.requests
            self.tokens += admitted.tokens

    def settle(self, admitted: Admitted, requests: int, tokens: int, now: int) -> None:
        """Return all but these amounts of what was admitted, if it is still in the window."""
        self.forget(now)
        if admitted.at + MINUTE > now:
            tokens = min(tokens, admitted.tokens)
            self.requests -= admitted.requests - requests
            self.tokens -= admitted.tokens - tokens
            admitted.requests, admitted.tokens = requests, tokens

    def forget(self, now: int) -> None:
        while self.past and self.past[0].at + MINUTE <= now:
            oldest = self.past.popleft()
            self.requests -= oldest.requests
            self.tokens -= oldest.tokens

    def wait(self, now: int, over: int, amount: Callable[[Admitted], int]) -> int:
        """Nanoseconds until the amounts of the past have fallen by `over`; 0: now.

        Raises ValueError if they never do.
        """
        if over <= 0:
            return 0
        for admitted in self.past:
            over -= amount(admitted)
            if over <= 0:
                return admitted.at + MINUTE - now
        raise ValueError(f"more than a limit was asked for at once, by {over}")


class LimitedError(RateLimitedError):
    """A limit has no room for the request now; `limit` is its field of Limits."""

    def __init__(self, limit: str, most: int, retry_after: float) -> None:
        super().__init__(
            f"this API key's limit {limit}, {most}, is reached; try again in {retry_after:.1f} s",
            retry_after=retry_after,
        )
        self.limit, self.most = limit, most


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

    async def admit(
        self, key: str, limits: Limits, prompt_tokens: int, new_tokens: int
    ) -> Admitted:
        """Charge a request with the most tokens that it may use. Answers without a wait.

        Raises TooLargeError if it can never be admitted and LimitedError if it can't be now; then
        nothing is charged.
        """
        check_size(limits, prompt_tokens, new_tokens)
        return self.charge(key, limits, prompt_tokens + new_tokens)

    def charge(self, key: str, limits: Limits, tokens: int, owner: str = "") -> Admitted:
        """Charge a request whose size was checked. Raises LimitedError as `admit` does."""
        state, now = self._states.setdefault(key, _State()), self._clock()
        state.forget(now)
        _check_room(state, limits, now, tokens)
        return self._begin(Admitted(key, now, tokens, owner), now)

    def adopt(self, key: str, age: int, tokens: int, owner: str = "") -> Admitted:
        """Note a running request that was admitted elsewhere, `age` nanoseconds ago."""
        now = self._clock()
        return self._begin(Admitted(key, now - age, tokens, owner), now)

    def end(self, admitted: Admitted, tokens: int) -> None:
        """Settle a request that has ended and used `tokens` tokens."""
        self._end(admitted, 1, tokens)

    def undo(self, admitted: Admitted) -> None:
        """Return the whole charge of a request that did not run."""
        self._end(admitted, 0, 0)

    def disown(self, owner: str) -> None:
        """Forget what the windows hold of an owner none of whose requests runs."""
        for state in self._states.values():
            for admitted in [each for each in state.past if each.owner == owner]:
                state.settle(admitted, 0, 0, self._clock())

    def past(self) -> Iterator[tuple[Admitted, int]]:
        """All that the windows hold, with its age in nanoseconds."""
        now = self._clock()
        for state in self._states.values():
            state.forget(now)
            yield from ((admitted, now - admitted.at) for admitted in state.past)

    def _begin(self, admitted: Admitted, now: int) -> Admitted:
        state = self._states.setdefault(admitted.key, _State())
        state.running += 1
        state.add(admitted, now)
        return admitted

    def _end(self, admitted: Admitted, requests: int, tokens: int) -> None:
        state = self._states[admitted.key]
        state.running -= 1
        state.settle(admitted, requests, tokens, self._clock())


def check_size(limits: Limits, prompt_tokens: int, new_tokens: int) -> None:
    """Raise TooLargeError if a request can never be admitted."""
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
        over = state.requests + 1 - limits.requests_per_minute
        wait = state.wait(now, over, lambda admitted: admitted.requests)
        waits["requests_per_minute"] = wait / SECOND
    if limits.tokens_per_minute is not None:
        over = state.tokens + tokens - limits.tokens_per_minute
        wait = state.wait(now, over, lambda admitted: admitted.tokens)
        waits["tokens_per_minute"] = wait / SECOND
    if any(waits.values()):
        limit = max(waits, key=lambda name: waits[name])
        raise LimitedError(limit, getattr(limits, limit), waits[limit])
