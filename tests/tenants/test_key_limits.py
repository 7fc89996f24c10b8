"""Limits: never more than the limit in any minute, and Retry-After tells the truth."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.tenants.key import Limits
from quickchange_server.tenants.limits import (
    MINUTE,
    SECOND,
    Admitted,
    LimitedError,
    Limiter,
    TooLargeError,
)


@dataclass
class Clock:
    now: int = 0

    def __call__(self) -> int:
        return self.now


@dataclass
class Ran:
    """What the test itself keeps of an admitted request."""

    at: int
    tokens: int  # charged, and then used
    ends: int
    used: int
    admitted: Admitted
    ended: bool = False


@dataclass(frozen=True)
class Request:
    """Comes `gap` ns after the one before, and ends after `lasts` ns."""

    gap: int
    prompt: int
    new: int
    lasts: int
    uses: int  # of `new`


@dataclass
class Replay:
    """Requests of one key against a Limiter, with books of its own."""

    limits: Limits
    clock: Clock = field(default_factory=Clock)
    ran: list[Ran] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self.limiter = Limiter(self.clock)

    def end_until(self, time: int) -> None:
        for ran in sorted(self.ran, key=lambda ran: ran.ends):
            if not ran.ended and ran.ends <= time:
                self.clock.now = max(self.clock.now, ran.ends)
                self.limiter.end(ran.admitted, ran.used)
                ran.tokens, ran.ended = ran.used, True

    def send(self, request: Request) -> LimitedError | None:
        try:
            admitted = admit(self.limiter, "key", self.limits, request.prompt, request.new)
        except LimitedError as error:
            self.refused += 1
            return error
        used = request.prompt + min(request.uses, request.new)
        ends, tokens = self.clock.now + request.lasts, request.prompt + request.new
        self.ran.append(Ran(self.clock.now, tokens, ends, used, admitted))
        return None

    def go(self, requests: list[Request]) -> None:
        for request in requests:
            arrives = self.clock.now + request.gap
            self.end_until(arrives)
            self.clock.now = arrives
            self.send(request)
            self.check()

    def check(self) -> None:
        """No window (t - 60 s, t] that ends with an admission holds more than the limits."""
        for last in self.ran:
            window = [r for r in self.ran if last.at - MINUTE < r.at <= last.at]
            assert len(window) <= (self.limits.requests_per_minute or math.inf)
            assert sum(r.tokens for r in window) <= (self.limits.tokens_per_minute or math.inf)
        running = sum(not r.ended for r in self.ran)
        assert running <= (self.limits.concurrent_requests or math.inf)


def admit(limiter: Limiter, key: str, limits: Limits, prompt: int, new: int) -> Admitted:
    """What admits without a wait, so that no event loop is needed."""
    with pytest.raises(StopIteration) as stopped:
        limiter.admit(key, limits, prompt, new).send(None)
    admitted = stopped.value.value
    assert isinstance(admitted, Admitted)
    return admitted


gaps = st.one_of(
    st.integers(0, 30 * SECOND), st.sampled_from([0, 1, MINUTE - 1, MINUTE, MINUTE + 1])
)
requests = st.builds(
    Request,
    gap=gaps,
    prompt=st.integers(1, 20),
    new=st.integers(1, 20),
    lasts=st.one_of(st.integers(0, 20 * SECOND), st.integers(0, 3 * MINUTE)),
    uses=st.integers(0, 20),
)
limits = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 6),
    tokens_per_minute=st.none() | st.integers(40, 120),
    concurrent_requests=st.none() | st.integers(1, 4),
)


@given(limits, st.lists(requests, max_size=30))
def test_no_minute_holds_more_than_the_limits(limits: Limits, sent: list[Request]) -> None:
    Replay(limits).go(sent)


@given(limits, st.lists(requests, max_size=20), requests)
def test_the_same_request_succeeds_after_retry_after_and_not_before(
    limits: Limits, sent: list[Request], last: Request
) -> None:
    limits = Limits(limits.requests_per_minute, limits.tokens_per_minute)
    replay = Replay(limits)
    replay.go(sent)
    error = replay.send(last)
    if error is None:
        return
    assert error.retry_after is not None
    refused_at, wait = replay.clock.now, round(error.retry_after * SECOND)
    replay.clock.now = refused_at + wait - 1
    assert replay.send(last) is not None
    replay.clock.now = refused_at + wait
    assert replay.send(last) is None


def test_a_minute_holds_the_whole_limit_from_its_first_nanosecond_to_its_last() -> None:
    replay = Replay(Limits(requests_per_minute=2))
    request = Request(0, 1, 1, 0, 1)
    assert replay.send(request) is None
    replay.clock.now = MINUTE - 1
    assert replay.send(request) is None
    error = replay.send(request)
    assert error is not None
    assert (error.limit, error.retry_after) == ("requests_per_minute", 1e-9)
    replay.clock.now = MINUTE
    assert replay.send(request) is None
    assert replay.send(request) is not None


def test_tokens_that_were_not_used_come_back() -> None:
    limiter, limits = Limiter(Clock()), Limits(tokens_per_minute=100)
    admitted = admit(limiter, "key", limits, 10, 90)
    with pytest.raises(LimitedError):
        admit(limiter, "key", limits, 10, 10)
    limiter.end(admitted, 20)
    admit(limiter, "key", limits, 10, 70)
    with pytest.raises(LimitedError) as raised:
        admit(limiter, "key", limits, 1, 1)
    assert raised.value.limit == "tokens_per_minute"


def test_what_did_not_run_is_given_back_whole() -> None:
    limiter = Limiter(Clock())
    limits = Limits(requests_per_minute=1, tokens_per_minute=2, concurrent_requests=1)
    limiter.undo(admit(limiter, "key", limits, 1, 1))
    admit(limiter, "key", limits, 1, 1)


def test_a_refused_request_takes_nothing() -> None:
    limiter = Limiter(Clock())
    limits = Limits(tokens_per_minute=100, concurrent_requests=1)
    admitted = admit(limiter, "key", limits, 1, 1)
    for _ in range(10):
        with pytest.raises(LimitedError, match="concurrent_requests"):
            admit(limiter, "key", limits, 40, 40)
    limiter.end(admitted, 2)
    admit(limiter, "key", limits, 49, 49)


def test_keys_do_not_share_limits() -> None:
    limiter, limits = Limiter(Clock()), Limits(requests_per_minute=1)
    admit(limiter, "one", limits, 1, 1)
    admit(limiter, "other", limits, 1, 1)


@pytest.mark.parametrize(
    ("limits", "named", "param"),
    [
        (Limits(max_prompt_tokens=9), "max_prompt_tokens", None),
        (Limits(max_new_tokens=19), "max_new_tokens", "max_tokens"),
        (Limits(tokens_per_minute=29), "tokens_per_minute", "max_tokens"),
    ],
)
def test_what_never_fits_is_a_bad_request_and_takes_nothing(
    limits: Limits, named: str, param: str | None
) -> None:
    limiter = Limiter(Clock())
    with pytest.raises(TooLargeError) as raised:
        admit(limiter, "key", limits, 10, 20)
    assert (raised.value.limit, raised.value.param, raised.value.status) == (named, param, 400)
    admit(limiter, "key", Limits(concurrent_requests=1), 10, 20)


def test_what_fits_exactly_is_admitted() -> None:
    limits = Limits(max_prompt_tokens=10, max_new_tokens=20, tokens_per_minute=30)
    admit(Limiter(Clock()), "key", limits, 10, 20)


def test_a_key_without_limits_keeps_no_more_than_a_minute_of_its_past() -> None:
    clock = Clock()
    limiter = Limiter(clock)

    def hold_after(requests: int) -> int:
        for _ in range(requests):
            clock.now += SECOND
            limiter.end(admit(limiter, "key", Limits(), 1, 1), 2)
        return len(pickle.dumps(limiter._states))

    assert hold_after(1000) == pytest.approx(hold_after(5000), rel=0.2)
