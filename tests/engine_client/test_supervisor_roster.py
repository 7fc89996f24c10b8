"""The recovery against a simulated engine: who is submitted, who is blamed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.config import Settings
from quickchange_server.engine_client.crash_recovery import CLEARED_AFTER_TOKENS, CrashRecovery
from quickchange_server.engine_client.in_flight_request import InFlightRequest
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, SamplingParams, Submit

MAX_DEATHS = 3
METRICS = Metrics(Settings(model="fake", store=Path("store")))


def make_request(name: str, max_tokens: int = 100) -> InFlightRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    metrics = METRICS.request("x", False, 1, 0.0)
    return InFlightRequest(Submit(name, (1,), sampling, seed=1), metrics, asyncio.Queue())


def depart(recovery: CrashRecovery) -> list[str]:
    names = []
    for request in recovery.to_submit():
        request.next_submission()
        recovery.submitted(request)
        names.append(request.request_id)
    recovery.check_integrity()
    return names


def emit(recovery: CrashRecovery, request: InFlightRequest, count: int) -> None:
    assert request.submission_id is not None
    for _ in range(count):
        request.deliver(Delta(request.submission_id, (7,)), 0.0)
    recovery.check_integrity()


def recovery_of(*requests: InFlightRequest, max_deaths: int = MAX_DEATHS) -> CrashRecovery:
    recovery = CrashRecovery(max_deaths)
    for request in requests:
        recovery.add(request)
    return recovery


def test_after_one_death_all_go_together_again() -> None:
    recovery = recovery_of(make_request("a"), make_request("b"))
    depart(recovery)
    assert recovery.engine_died() is None
    assert depart(recovery) == ["a", "b"]


def test_suspects_are_tried_alone_the_one_that_got_nowhere_first() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    for _ in range(2):
        depart(recovery)
        emit(recovery, a, 3)
        recovery.engine_died()
    assert depart(recovery) == ["b"]
    recovery.add(make_request("new"))
    assert depart(recovery) == []


def test_a_cleared_suspect_makes_room_for_the_next_and_then_all_go_on() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    for _ in range(2):
        depart(recovery)
        recovery.engine_died()
    assert depart(recovery) == ["a"]
    emit(recovery, a, CLEARED_AFTER_TOKENS - 1)
    assert recovery.acquit() is None
    assert depart(recovery) == []
    emit(recovery, a, 1)
    assert recovery.acquit() == "a/3"
    assert depart(recovery) == ["b"]
    emit(recovery, b, CLEARED_AFTER_TOKENS)
    assert recovery.acquit() is None  # nothing else to try: it goes on
    assert depart(recovery) == ["a"]


def test_a_late_delta_of_an_earlier_submission_finds_no_flight() -> None:
    a = make_request("a")
    recovery = recovery_of(a)
    depart(recovery)
    recovery.engine_died()
    depart(recovery)
    assert recovery.find("a") is None
    assert recovery.find("a/2") is a


def test_the_one_that_dies_alone_is_the_culprit_and_explains_the_others_deaths() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    for _ in range(2):
        depart(recovery)
        emit(recovery, b, 1)
        recovery.engine_died()
    assert depart(recovery) == ["a"]
    assert recovery.engine_died() is a
    assert b.deaths == 0
    assert depart(recovery) == ["b"]


@dataclass
class Simulation:
    """An engine that dies whenever a request stands at its poisonous position."""

    max_deaths: int
    lengths: dict[str, int]
    poisons: dict[str, int]
    recovery: CrashRecovery = field(init=False)
    convicted: set[str] = field(default_factory=set)
    completed: set[str] = field(default_factory=set)
    deaths: int = 0

    def __post_init__(self) -> None:
        self.requests = {name: make_request(name, n) for name, n in self.lengths.items()}
        self.recovery = recovery_of(*self.requests.values(), max_deaths=self.max_deaths)

    def aboard(self) -> list[InFlightRequest]:
        return [f for f in self.requests.values() if f.submission_id is not None]

    def advance(self) -> None:
        depart(self.recovery)
        for request in self.aboard():
            name = request.request_id
            if len(request.emitted) == self.poisons.get(name, -1):
                self.die()
                return
            emit(self.recovery, request, 1)
            if len(request.emitted) == self.lengths[name]:
                self.completed.add(name)
                self.recovery.remove(request)
        self.recovery.acquit()
        self.recovery.check_integrity()

    def die(self) -> None:
        self.deaths += 1
        culprit = self.recovery.engine_died()
        self.recovery.check_integrity()
        if culprit is not None:
            self.convicted.add(culprit.request_id)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    poisons=st.lists(st.integers(0, 39) | st.none(), min_size=8, max_size=8),
    max_deaths=st.integers(1, 5),
)
def test_every_poison_is_convicted_and_every_innocent_completes(
    lengths: list[int], poisons: list[int | None], max_deaths: int
) -> None:
    named = {f"r{i}": length for i, length in enumerate(lengths)}
    at = {
        name: position
        for (name, length), position in zip(named.items(), poisons, strict=False)
        if position is not None and position < length
    }
    simulation = Simulation(max_deaths, named, at)
    for _ in range(20_000):
        if not len(simulation.recovery):
            break
        simulation.advance()
    assert simulation.convicted == set(at)
    assert simulation.completed == set(named) - set(at)
    assert simulation.deaths <= max(2, max_deaths) * len(at)


@given(st.lists(st.sampled_from(["step", "kill", "leave", "arrive"]), max_size=80), st.data())
def test_the_roster_stays_whole_under_arrivals_departures_and_kills(
    events: list[str], data: st.DataObject
) -> None:
    simulation = Simulation(MAX_DEATHS, {"r0": 30, "r1": 30}, {"r1": 5})
    for number, event in enumerate(events):
        if event == "step":
            simulation.advance()
        elif event == "kill":
            simulation.die()
        elif event == "arrive":
            name = f"n{number}"
            simulation.lengths[name] = 20
            simulation.requests[name] = make_request(name, 20)
            simulation.recovery.add(simulation.requests[name])
        elif len(simulation.recovery):
            request = data.draw(st.sampled_from(list(simulation.recovery.requests)))
            simulation.recovery.remove(request)
        simulation.recovery.check_integrity()
    for _ in range(5_000):
        if not len(simulation.recovery):
            break
        simulation.advance()
    assert not len(simulation.recovery)
