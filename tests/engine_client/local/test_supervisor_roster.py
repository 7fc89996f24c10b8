"""The recovery against simulated engines: who is submitted, who is tried, who is blamed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.config import Settings
from quickchange_server.engine_client.in_flight_request import TELLING_TOKENS, InFlightRequest
from quickchange_server.engine_client.local.crash_recovery import CrashRecovery
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, SamplingParams, Submit

MAX_DEATHS = 3
METRICS = Metrics(Settings(model="fake", store=Path("store")))


def make_request(name: str, max_tokens: int = 100) -> InFlightRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    metrics = METRICS.request("x", False, 1, 0.0)
    return InFlightRequest(Submit(name, (1,), sampling, seed=1), metrics, asyncio.Queue())


def depart(recovery: CrashRecovery) -> list[str]:
    """Submit what may be submitted to the serving engine, which begins at once."""
    names = []
    for request in recovery.to_submit():
        request.next_submission()
        recovery.submitted(request)
        begin(recovery, request)
        names.append(request.request_id)
    recovery.check_integrity()
    return names


def try_one(recovery: CrashRecovery) -> str | None:
    request = recovery.to_try()
    if request is None:
        return None
    request.next_submission()
    recovery.tried(request)
    begin(recovery, request)
    recovery.check_integrity()
    return request.request_id


def begin(recovery: CrashRecovery, request: InFlightRequest) -> None:
    assert request.submission_id is not None
    recovery.began(request.submission_id)


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


def test_streams_that_got_on_go_to_the_next_engine_and_the_new_one_is_tried() -> None:
    old, new, waiting = make_request("old"), make_request("new"), make_request("waiting")
    recovery = recovery_of(old)
    depart(recovery)
    emit(recovery, old, TELLING_TOKENS)
    recovery.add(new)
    depart(recovery)
    recovery.add(waiting)
    for request in recovery.to_submit():  # has it, and has not begun to work on it
        request.next_submission()
        recovery.submitted(request)
    assert recovery.engine_died(outside=False) is None
    assert depart(recovery) == ["old", "waiting"]
    assert try_one(recovery) == "new"


def test_a_kill_from_outside_makes_no_suspect_of_streams_that_got_on() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    for _ in range(5):
        assert depart(recovery) == ["a", "b"]
        emit(recovery, a, TELLING_TOKENS)
        emit(recovery, b, TELLING_TOKENS)
        recovery.engine_died(outside=True)
    assert not recovery.suspects_wait


def test_two_deaths_from_outside_without_progress_make_a_suspect() -> None:
    a = make_request("a")
    recovery = recovery_of(a)
    depart(recovery)
    emit(recovery, a, TELLING_TOKENS)
    for suspect in (False, True):
        recovery.engine_died(outside=True)
        assert recovery.suspects_wait == suspect
        depart(recovery)


def test_where_all_got_on_a_death_from_inside_suspects_all_that_were_worked_on() -> None:
    a, b, idle = make_request("a"), make_request("b"), make_request("idle")
    recovery = recovery_of(a, b)
    depart(recovery)
    emit(recovery, a, TELLING_TOKENS + 1)
    emit(recovery, b, TELLING_TOKENS)
    recovery.add(idle)
    idle.next_submission()
    recovery.submitted(idle)
    recovery.engine_died(outside=False)
    assert depart(recovery) == ["idle"]
    assert try_one(recovery) == "b"  # which made least progress
    assert try_one(recovery) is None, "one at a time"
    emit(recovery, b, TELLING_TOKENS)
    assert recovery.acquit() == "b/2"
    assert depart(recovery) == ["b"]
    assert try_one(recovery) == "a"


def test_a_suspect_is_given_up_after_its_deaths_and_not_before() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    depart(recovery)
    emit(recovery, b, TELLING_TOKENS)
    recovery.engine_died(outside=False)
    assert depart(recovery) == ["b"]
    assert try_one(recovery) == "a"
    assert recovery.trial_died() is None
    assert try_one(recovery) == "a"
    assert recovery.trial_died() is a
    assert try_one(recovery) is None
    assert len(recovery) == 1


def test_without_an_engine_of_their_own_suspects_are_tried_while_the_others_wait() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    recovery.apart = False
    depart(recovery)
    emit(recovery, b, TELLING_TOKENS)
    recovery.engine_died(outside=False)
    assert depart(recovery) == []
    assert try_one(recovery) == "a"
    assert depart(recovery) == []
    emit(recovery, a, TELLING_TOKENS)
    assert recovery.acquit() is None, "it runs on, since none is to be tried after it"
    assert depart(recovery) == ["b"]


def test_where_the_engine_for_trials_fails_the_others_are_called_back() -> None:
    a, b = make_request("a"), make_request("b")
    recovery = recovery_of(a, b)
    depart(recovery)
    emit(recovery, b, TELLING_TOKENS)
    recovery.engine_died(outside=False)
    assert depart(recovery) == ["b"]
    recovery.apart = False
    assert recovery.recall() == ["b/2"]
    assert depart(recovery) == []
    assert try_one(recovery) == "a"


def test_a_late_delta_of_an_earlier_submission_finds_no_request() -> None:
    a = make_request("a")
    recovery = recovery_of(a)
    depart(recovery)
    emit(recovery, a, TELLING_TOKENS)
    recovery.engine_died(outside=True)
    depart(recovery)
    assert recovery.find("a") is None
    assert recovery.find("a/2") is a


@dataclass
class Simulation:
    """Engines that die whenever a request stands at its poisonous position."""

    max_deaths: int
    lengths: dict[str, int]
    poisons: dict[str, int]
    apart: bool = True
    recovery: CrashRecovery = field(init=False)
    convicted: set[str] = field(default_factory=set)
    completed: set[str] = field(default_factory=set)
    deaths: int = 0  # of the serving engine, or of any if there is but one
    trials: int = 0  # that ended in a death

    def __post_init__(self) -> None:
        self.requests = {name: make_request(name, n) for name, n in self.lengths.items()}
        self.recovery = recovery_of(*self.requests.values(), max_deaths=self.max_deaths)
        self.recovery.apart = self.apart

    def advance(self) -> None:
        depart(self.recovery)
        try_one(self.recovery)
        aboard = [r for r in self.requests.values() if r.submission_id is not None]
        for request in aboard:
            on_trial = self.recovery.on_trial is request
            if request.submission_id is None:
                continue  # its engine has died in this step
            name = request.request_id
            if len(request.emitted) == self.poisons.get(name, -1):
                self.die(trial=on_trial)
                continue
            emit(self.recovery, request, 1)
            if len(request.emitted) == self.lengths[name]:
                self.completed.add(name)
                self.recovery.remove(request)
        self.recovery.acquit()
        self.recovery.check_integrity()

    def die(self, *, trial: bool, outside: bool = False) -> None:
        if trial and self.apart:
            self.trials += 1
            culprit = self.recovery.trial_died()
        else:
            self.deaths += 1
            culprit = self.recovery.engine_died(outside=outside)
        self.recovery.check_integrity()
        if culprit is not None:
            self.convicted.add(culprit.request_id)

    def run(self) -> None:
        for _ in range(20_000):
            if not len(self.recovery):
                return
            self.advance()
        raise AssertionError("it never ends")


@pytest.mark.parametrize("apart", [True, False])
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    poisons=st.lists(st.integers(0, 39) | st.none(), min_size=8, max_size=8),
    max_deaths=st.integers(1, 5),
)
def test_every_poison_is_convicted_and_every_innocent_completes(
    apart: bool, lengths: list[int], poisons: list[int | None], max_deaths: int
) -> None:
    named = {f"r{i}": length for i, length in enumerate(lengths)}
    at = {
        name: position
        for (name, length), position in zip(named.items(), poisons, strict=False)
        if position is not None and position < length
    }
    simulation = Simulation(max_deaths, named, at, apart)
    simulation.run()
    assert simulation.convicted == set(at)
    assert simulation.completed == set(named) - set(at)
    if apart:
        assert simulation.deaths <= 2 * len(at)
        assert simulation.trials <= max(1, max_deaths - 1) * len(at)


@settings(deadline=None)
@given(
    old=st.integers(0, 20),
    poisons=st.lists(st.integers(0, TELLING_TOKENS - 1), min_size=1, max_size=4),
)
def test_streams_that_got_on_stall_once_whatever_new_requests_do(
    old: int, poisons: list[int]
) -> None:
    lengths = {f"old{i}": 60 for i in range(old)}
    simulation = Simulation(MAX_DEATHS, dict(lengths), {})
    for _ in range(TELLING_TOKENS):
        simulation.advance()
    for index, position in enumerate(poisons):
        name = f"new{index}"
        simulation.poisons[name], simulation.lengths[name] = position, 50
        simulation.requests[name] = make_request(name)
        simulation.recovery.add(simulation.requests[name])
    simulation.run()
    assert simulation.convicted == {f"new{i}" for i in range(len(poisons))}
    assert simulation.completed == set(lengths)
    assert simulation.deaths == 1


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["step", "kill", "leave", "arrive", "end trial"]), max_size=80),
    st.booleans(),
    st.data(),
)
def test_the_roster_stays_whole_under_arrivals_departures_and_kills(
    events: list[str], apart: bool, data: st.DataObject
) -> None:
    simulation = Simulation(MAX_DEATHS, {"r0": 30, "r1": 30}, {"r1": 5}, apart)
    for number, event in enumerate(events):
        if event == "step":
            simulation.advance()
        elif event == "kill":
            simulation.die(trial=False, outside=True)
        elif event == "end trial":
            simulation.die(trial=True, outside=True)
        elif event == "arrive":
            name = f"n{number}"
            simulation.lengths[name] = 20
            simulation.requests[name] = make_request(name, 20)
            simulation.recovery.add(simulation.requests[name])
        elif len(simulation.recovery):
            request = data.draw(st.sampled_from(list(simulation.recovery.requests)))
            simulation.recovery.remove(request)
        simulation.recovery.check_integrity()
    simulation.run()
