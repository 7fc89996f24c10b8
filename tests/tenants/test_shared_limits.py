"""Limits over several replicas: exact while the counter lives, bounded whatever dies."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_counter import Passage, Place, Wire
from virtual_time import run_virtual, virtual_nanoseconds

from quickchange_server.tenants.key import Limits
from quickchange_server.tenants.limit_counter import (
    LEASE,
    Ended,
    LimitCounter,
    LimitMessage,
    Past,
    ToAdmit,
)
from quickchange_server.tenants.limits import (
    MINUTE,
    SECOND,
    Admitted,
    LimitedError,
    TooLargeError,
)
from quickchange_server.tenants.shared_limits import ANSWER_SECONDS, BEAT_SECONDS, SharedLimits

LEASE_SECONDS = LEASE / SECOND
SLOWEST = 0.3  # seconds of a wire's way there, or back, that still answers in time


@dataclass(eq=False)
class Ingress:
    """A replica with what runs on it."""

    place: Place
    wire: Wire
    alone: int = 0

    def __post_init__(self) -> None:
        self.limits = SharedLimits(self.wire, self._counted, virtual_nanoseconds)
        self.tasks: set[asyncio.Task[None]] = set()
        self.dead_at: float | None = None

    def _counted(self) -> None:
        self.alone += self.dead_at is None

    async def admitted(self, limits: Limits, tokens: int = 10, key: str = "key") -> Admitted | None:
        """None: refused."""
        try:
            return await self.limits.admit(key, limits, tokens - 1, 1)
        except LimitedError:
            return None

    def die(self) -> None:
        """End at once, as by SIGKILL: nobody is told."""
        self.wire.cut, self.dead_at = True, asyncio.get_running_loop().time()
        for task in self.tasks:
            task.cancel()
        self.limits._talk.cancel()


def ingresses(count: int = 2) -> list[Ingress]:
    """So many replicas of one living counter."""
    place = Place(virtual_nanoseconds)
    place.begin()
    return [Ingress(place, Wire(place)) for _ in range(count)]


def virtually(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs in virtual time."""

    def run() -> None:
        run_virtual(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# --- one case each ------------------------------------------------------------------------------


@virtually
async def test_600_tokens_a_minute_are_600_tokens_through_two_ingresses() -> None:
    pair, limits = ingresses(), Limits(tokens_per_minute=600)
    spent = 0
    for turn in range(100):
        admitted = await pair[turn % 2].admitted(limits, 20)
        if admitted is not None:
            spent += 20
            pair[turn % 2].limits.end(admitted, 20)
        await asyncio.sleep(0.5)
    assert spent == 600


@virtually
async def test_retry_after_is_true_over_all_ingresses() -> None:
    one, other = ingresses()
    limits = Limits(requests_per_minute=1)
    assert await one.admitted(limits) is not None
    await asyncio.sleep(20)
    with pytest.raises(LimitedError, match=r"requests_per_minute, 1, is reached; .* 40\.0 s") as e:
        await other.limits.admit("key", limits, 1, 1)
    assert e.value.retry_after == pytest.approx(40)
    await asyncio.sleep(39.9)
    assert await other.admitted(limits) is None
    await asyncio.sleep(0.2)
    assert await other.admitted(limits) is not None


@virtually
async def test_what_one_ingress_gives_back_another_can_use() -> None:
    one, other = ingresses()
    limits = Limits(tokens_per_minute=100, requests_per_minute=2, concurrent_requests=1)
    admitted = await one.admitted(limits, 100)
    assert admitted is not None
    assert await other.admitted(limits, 10) is None
    one.limits.end(admitted, 30)
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    admitted = await other.admitted(limits, 70)
    assert admitted is not None
    other.limits.undo(admitted)
    await asyncio.sleep(0.01)
    assert await one.admitted(limits, 70) is not None


@virtually
async def test_what_never_fits_is_refused_without_the_counter() -> None:
    (one,) = ingresses(1)
    one.wire.cut = True
    with pytest.raises(TooLargeError):
        await one.limits.admit("key", Limits(tokens_per_minute=5), 5, 1)
    assert asyncio.get_running_loop().time() == 0


@virtually
async def test_a_key_without_limits_of_several_requests_does_not_wait() -> None:
    (one,) = ingresses(1)
    one.wire.cut = True
    admitting = one.limits.admit("key", Limits(max_new_tokens=5), 5, 1)
    with pytest.raises(StopIteration):
        admitting.send(None)


@virtually
async def test_a_counter_that_does_not_answer_freezes_no_request() -> None:
    (one,) = ingresses(1)
    one.wire.cut = True
    loop = asyncio.get_running_loop()
    assert await one.admitted(Limits(requests_per_minute=2)) is not None
    assert loop.time() <= 2 * ANSWER_SECONDS
    asked = loop.time()
    assert await one.admitted(Limits(requests_per_minute=2)) is not None
    assert await one.admitted(Limits(requests_per_minute=2)) is None
    assert loop.time() == asked  # only the first wait for it
    assert one.alone == 3


@virtually
async def test_all_that_wait_for_a_silent_counter_go_on_together() -> None:
    (one,) = ingresses(1)
    one.wire.cut = True

    async def late(after: float) -> float:
        await asyncio.sleep(after)
        began = asyncio.get_running_loop().time()
        await one.admitted(Limits(requests_per_minute=100))
        return asyncio.get_running_loop().time() - began

    waits = await asyncio.gather(*(late(after / 10) for after in range(20)))
    assert max(waits) <= ANSWER_SECONDS


@virtually
async def test_a_new_counter_learns_the_minute_and_what_runs_from_the_ingresses() -> None:
    one, other = ingresses()
    limits = Limits(tokens_per_minute=100, concurrent_requests=2)
    running = await one.admitted(limits, 40)
    ended = await one.admitted(limits, 40)
    assert running is not None
    assert ended is not None
    one.limits.end(ended, 30)
    await asyncio.sleep(10)
    one.place.begin()
    await asyncio.sleep(BEAT_SECONDS + 0.1)
    assert await other.admitted(limits, 31) is None
    second = await other.admitted(limits, 30)
    assert second is not None
    other.limits.undo(second)
    assert await other.admitted(Limits(concurrent_requests=1)) is None
    one.limits.end(running, 40)
    await asyncio.sleep(0.01)
    assert await other.admitted(Limits(concurrent_requests=1)) is not None
    await asyncio.sleep(50)  # a minute after the first counter admitted them
    assert await other.admitted(Limits(tokens_per_minute=100), 90) is not None


@virtually
async def test_requests_admitted_while_the_counter_was_away_count_when_it_is_back() -> None:
    one, other = ingresses()
    one.place.counter = None
    limits = Limits(requests_per_minute=3, concurrent_requests=3)
    for _ in range(3):
        assert await one.admitted(limits) is not None
    one.place.begin()
    await asyncio.sleep(BEAT_SECONDS + 0.1)
    assert await other.admitted(limits) is None
    assert other.alone == 0


@virtually
async def test_what_a_dead_ingress_ran_counts_as_used_and_runs_no_more_after_the_lease() -> None:
    one, other = ingresses()
    limits = Limits(tokens_per_minute=100, concurrent_requests=1)
    assert await one.admitted(limits, 60) is not None
    one.die()
    await asyncio.sleep(LEASE_SECONDS - 0.5)
    assert await other.admitted(Limits(concurrent_requests=1)) is None
    await asyncio.sleep(1)
    assert await other.admitted(Limits(tokens_per_minute=100), 50) is None
    admitted = await other.admitted(limits, 40)
    assert admitted is not None
    other.limits.end(admitted, 40)
    await asyncio.sleep(60 - LEASE_SECONDS)
    assert await other.admitted(limits, 60) is not None


@virtually
async def test_an_ingress_that_was_cut_off_for_long_has_its_requests_counted_again() -> None:
    one, other = ingresses()
    limits = Limits(concurrent_requests=1)
    running = await one.admitted(limits)
    assert running is not None
    one.wire.cut = True
    await asyncio.sleep(LEASE_SECONDS + 2)
    admitted = await other.admitted(limits)
    assert admitted is not None
    other.limits.end(admitted, 1)
    one.wire.cut = False
    await asyncio.sleep(BEAT_SECONDS + 1.1)
    assert await other.admitted(limits) is None
    one.limits.end(running, 10)
    await asyncio.sleep(0.01)
    assert await other.admitted(Limits(tokens_per_minute=30), 20) is None  # 2 x 10, not 3 x 10
    assert await other.admitted(Limits(tokens_per_minute=30)) is not None


@virtually
async def test_an_ingress_that_ends_in_order_leaves_nothing_running() -> None:
    one, other = ingresses()
    limits = Limits(concurrent_requests=1)
    admitted = await one.admitted(limits)
    assert admitted is not None
    one.limits.end(admitted, 10)
    await one.limits.close()
    assert await other.admitted(limits) is not None


@pytest.mark.parametrize("after", [0, 0.05, 0.15, 0.2, 0.25])
def test_a_request_whose_client_leaves_while_it_asks_takes_nothing(after: float) -> None:
    async def work() -> None:
        one, other = ingresses()
        one.wire.passages = cycle([Passage(there=0.1, back=0.1)])
        limits = Limits(requests_per_minute=1, tokens_per_minute=10, concurrent_requests=1)
        asking = asyncio.create_task(one.limits.admit("key", limits, 9, 1))
        await asyncio.sleep(after)
        asking.cancel()
        await asyncio.wait([asking])
        if not asking.cancelled():  # it was admitted before
            one.limits.undo(asking.result())
        await asyncio.sleep(1)
        assert await other.admitted(limits) is not None

    run_virtual(work())


@virtually
async def test_the_log_tells_once_that_the_counter_is_away_and_once_that_it_is_back() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("quickchange_server.tenants.shared_limits")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        (one,) = ingresses(1)
        one.place.counter = None
        for _ in range(5):
            await one.admitted(Limits(requests_per_minute=5))
            await asyncio.sleep(1)
        one.place.begin()
        await asyncio.sleep(3)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [line.split(" limits ")[1].split()[0] for line in lines] == ["does", "answers"]


def test_messages_and_replies_can_be_pickled() -> None:
    limits = Limits(requests_per_minute=1)
    message = LimitMessage(
        "r", 1, (Past("k", 5, 6, None),), (Ended(1, None),), (ToAdmit(2, "k", limits, 3),)
    )
    assert pickle.loads(pickle.dumps(message)) == message
    reply = LimitCounter(lambda: 0).exchange(message)
    assert set(reply.refused or ()) == {2}
    assert pickle.loads(pickle.dumps(reply)) == reply


@pytest.mark.parametrize("number", [1, 2])
def test_a_message_that_comes_late_or_twice_changes_nothing(number: int) -> None:
    counter = LimitCounter(lambda: 0)
    limits = Limits(concurrent_requests=2)
    asked = LimitMessage("r", 1, (), (), (ToAdmit(1, "k", limits, 3),))
    assert counter.exchange(asked).refused == {}
    assert counter.exchange(LimitMessage("r", 2, None, (Ended(1, 3),))).refused == {}
    late = LimitMessage(
        "r", number, (), (), (ToAdmit(1, "k", limits, 3), ToAdmit(2, "k", limits, 3))
    )
    assert counter.exchange(late).refused is None
    fits = LimitMessage("s", 1, (), (), (ToAdmit(1, "k", limits, 3), ToAdmit(2, "k", limits, 3)))
    assert counter.exchange(fits).refused == {}


def test_the_counter_keeps_no_more_than_its_last_minute_and_what_runs() -> None:
    now = 0
    counter = LimitCounter(lambda: now)

    def hold_after(replicas: int) -> int:
        nonlocal now
        for replica in range(replicas):
            now += SECOND
            ask = ToAdmit(1, "k", Limits(requests_per_minute=10**6), 3)
            counter.exchange(LimitMessage(f"{now}-{replica}", 1, (), (), (ask,)))
        return len(pickle.dumps((counter._limiter._states, counter._replicas)))

    assert hold_after(500) == pytest.approx(hold_after(2000), rel=0.2)


# --- schedules ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Comes `gap` s after the one before on its ingress, and ends after `lasts` s."""

    gap: float
    tokens: int
    lasts: float
    uses: int  # of `tokens`


@dataclass
class Ran:
    at: float
    tokens: int  # charged, and then used
    ingress: Ingress
    ended: bool = False


@dataclass(frozen=True)
class Event:
    """After `gap` s the counter dies for `lasts` s, or an ingress dies and another begins."""

    gap: float
    what: int  # 0: the counter; else an ingress
    lasts: float


@dataclass
class Schedule:
    """Requests of one key over several ingresses, with books of its own."""

    limits: Limits
    sent: list[list[Request]]
    passages: list[Passage]
    events: list[Event]
    ran: list[Ran] = field(default_factory=list)
    all: list[Ingress] = field(default_factory=list)

    async def go(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.place = Place(virtual_nanoseconds)
        self.place.begin()
        work = [asyncio.create_task(self.events_pass())]
        work += [self.start(requests) for requests in self.sent]
        await asyncio.gather(*work, return_exceptions=True)
        failed = [task.exception() for task in work if not task.cancelled() and task.exception()]
        assert not failed, failed
        await self.check_the_end()

    def start(self, requests: list[Request]) -> asyncio.Task[None]:
        ingress = Ingress(self.place, Wire(self.place, cycle(self.passages)))
        self.all.append(ingress)
        task = asyncio.create_task(self.send(ingress, requests))
        ingress.tasks.add(task)
        return task

    async def send(self, ingress: Ingress, requests: list[Request]) -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                await asyncio.sleep(request.gap)
                group.create_task(self.run(ingress, request))

    async def run(self, ingress: Ingress, request: Request) -> None:
        asked = self.loop.time()
        admitted = await ingress.admitted(self.limits, request.tokens)
        assert self.loop.time() - asked <= 2 * ANSWER_SECONDS + 0.001
        if admitted is None:
            return
        ran = Ran(self.loop.time(), request.tokens, ingress)
        self.ran.append(ran)
        self.check()
        await asyncio.sleep(request.lasts)
        used = min(request.uses, request.tokens)
        ingress.limits.end(admitted, used)
        ran.tokens, ran.ended = used, True

    async def events_pass(self) -> None:
        for event in self.events:
            await asyncio.sleep(event.gap)
            if event.what == 0:
                self.place.counter = None
                await asyncio.sleep(event.lasts)
                self.place.begin()
            else:
                living = [ingress for ingress in self.all if ingress.dead_at is None]
                living[event.what % len(living)].die()
                self.start([])

    def times_the_limit(self) -> int:
        """Ingresses of the last minute, if any of them ever counted alone or the counter died."""
        if self.place.lives == 1 and not any(ingress.alone for ingress in self.all):
            return 1
        now = self.loop.time()
        return sum(i.dead_at is None or i.dead_at > now - 60 for i in self.all)

    def check(self) -> None:
        """The last minute, but for the longest that an answer took, is within the bound."""
        now, most = self.loop.time(), self.times_the_limit()
        window = [r for r in self.ran if r.at > now - 60 + 2 * SLOWEST]
        assert len(window) <= most * (self.limits.requests_per_minute or math.inf)
        assert sum(r.tokens for r in window) <= most * (self.limits.tokens_per_minute or math.inf)
        running = sum(not r.ended and r.ingress.dead_at is None for r in self.ran)
        assert running <= most * (self.limits.concurrent_requests or math.inf)

    async def check_the_end(self) -> None:
        """Once all is well again, what runs is known, and after a minute no charge is left."""
        for ingress in self.all:
            ingress.wire.passages = cycle([Passage()])
        if self.place.counter is None:
            self.place.begin()
        await asyncio.sleep(LEASE_SECONDS + 3)
        one = next(ingress for ingress in self.all if ingress.dead_at is None)
        counted = one.alone
        first = await one.admitted(Limits(concurrent_requests=1))
        assert first is not None
        assert await one.admitted(Limits(concurrent_requests=1)) is None
        one.limits.end(first, 10)
        await asyncio.sleep(61)
        assert await one.admitted(Limits(tokens_per_minute=100), 100) is not None
        assert one.alone == counted


seconds = st.one_of(st.floats(0, 20), st.sampled_from([0.0, 0.5, 1.0, 10.0, 59.0, 60.0, 61.0]))
requests = st.builds(
    Request,
    gap=seconds,
    tokens=st.integers(2, 40),
    lasts=st.floats(0, 30) | st.just(90.0),
    uses=st.integers(1, 40),
)
limits = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(1, 6),
    tokens_per_minute=st.integers(40, 120),
    concurrent_requests=st.none() | st.integers(1, 4),
)
sent = st.lists(st.lists(requests, max_size=12), min_size=1, max_size=3)
in_time = st.builds(
    Passage, st.just("arrives"), there=st.floats(0, SLOWEST), back=st.floats(0, SLOWEST)
)
any_way = in_time | st.builds(
    Passage,
    st.sampled_from(["arrives", "lost", "answer lost", "refused"]),
    there=st.floats(0, 3),
    back=st.floats(0, 3),
)
deaths = st.builds(Event, gap=seconds, what=st.integers(1, 3), lasts=st.just(0.0))
events = deaths | st.builds(Event, gap=seconds, what=st.just(0), lasts=st.floats(0, 30))


@settings(deadline=None, max_examples=50)
@given(limits, sent, st.lists(in_time, min_size=1, max_size=6), st.lists(deaths, max_size=3))
def test_while_the_counter_answers_no_minute_holds_more_than_the_limits(
    limits: Limits, sent: list[list[Request]], passages: list[Passage], events: list[Event]
) -> None:
    schedule = Schedule(limits, sent, passages, events)
    run_virtual(schedule.go())
    assert not any(ingress.alone for ingress in schedule.all)


@settings(deadline=None, max_examples=50)
@given(limits, sent, st.lists(any_way, min_size=1, max_size=6), st.lists(events, max_size=3))
def test_whatever_dies_or_is_lost_no_minute_holds_more_than_the_limits_for_each_ingress(
    limits: Limits, sent: list[list[Request]], passages: list[Passage], events: list[Event]
) -> None:
    run_virtual(Schedule(limits, sent, passages, events).go())


def test_the_lease_outlasts_a_few_lost_messages() -> None:
    assert LEASE_SECONDS > 4 * (ANSWER_SECONDS + BEAT_SECONDS)
    assert LEASE < MINUTE
