"""The roster against a simulated engine: who is submitted, who is blamed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.config import Settings
from quickchange_server.engine_client.crash_recovery import CLEARED_AFTER_TOKENS, Roster
from quickchange_server.engine_client.in_flight_request import Flight
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, SamplingParams, Submit

MAX_DEATHS = 3
METRICS = Metrics(Settings(model="fake", store=Path("store")))


def make_flight(name: str, max_tokens: int = 100) -> Flight:
    sampling = SamplingParams(max_tokens=max_tokens)
    metrics = METRICS.request("x", False, 1, 0.0)
    return Flight(Submit(name, (1,), sampling, seed=1), metrics, asyncio.Queue())


def depart(roster: Roster) -> list[str]:
    names = []
    for flight in roster.departures():
        flight.board()
        roster.boarded(flight)
        names.append(flight.request_id)
    roster.check_integrity()
    return names


def emit(roster: Roster, flight: Flight, count: int) -> None:
    assert flight.ticket is not None
    for _ in range(count):
        flight.deliver(Delta(flight.ticket, (7,)), 0.0)
    roster.check_integrity()


def roster_of(*flights: Flight, max_deaths: int = MAX_DEATHS) -> Roster:
    roster = Roster(max_deaths)
    for flight in flights:
        roster.add(flight)
    return roster


def test_after_one_death_all_go_together_again() -> None:
    roster = roster_of(make_flight("a"), make_flight("b"))
    depart(roster)
    assert roster.engine_died() is None
    assert depart(roster) == ["a", "b"]


def test_suspects_are_tried_alone_the_one_that_got_nowhere_first() -> None:
    a, b = make_flight("a"), make_flight("b")
    roster = roster_of(a, b)
    for _ in range(2):
        depart(roster)
        emit(roster, a, 3)
        roster.engine_died()
    assert depart(roster) == ["b"]
    roster.add(make_flight("new"))
    assert depart(roster) == []


def test_a_cleared_suspect_makes_room_for_the_next_and_then_all_go_on() -> None:
    a, b = make_flight("a"), make_flight("b")
    roster = roster_of(a, b)
    for _ in range(2):
        depart(roster)
        roster.engine_died()
    assert depart(roster) == ["a"]
    emit(roster, a, CLEARED_AFTER_TOKENS - 1)
    assert roster.acquit() is None
    assert depart(roster) == []
    emit(roster, a, 1)
    assert roster.acquit() == "a/3"
    assert depart(roster) == ["b"]
    emit(roster, b, CLEARED_AFTER_TOKENS)
    assert roster.acquit() is None  # nothing else to try: it goes on
    assert depart(roster) == ["a"]


def test_a_late_delta_of_an_earlier_submission_finds_no_flight() -> None:
    a = make_flight("a")
    roster = roster_of(a)
    depart(roster)
    roster.engine_died()
    depart(roster)
    assert roster.find("a") is None
    assert roster.find("a/2") is a


def test_the_one_that_dies_alone_is_the_culprit_and_explains_the_others_deaths() -> None:
    a, b = make_flight("a"), make_flight("b")
    roster = roster_of(a, b)
    for _ in range(2):
        depart(roster)
        emit(roster, b, 1)
        roster.engine_died()
    assert depart(roster) == ["a"]
    assert roster.engine_died() is a
    assert b.deaths == 0
    assert depart(roster) == ["b"]


@dataclass
class Simulation:
    """An engine that dies whenever a flight stands at its poisonous position."""

    max_deaths: int
    lengths: dict[str, int]
    poisons: dict[str, int]
    roster: Roster = field(init=False)
    convicted: set[str] = field(default_factory=set)
    completed: set[str] = field(default_factory=set)
    deaths: int = 0

    def __post_init__(self) -> None:
        self.flights = {name: make_flight(name, n) for name, n in self.lengths.items()}
        self.roster = roster_of(*self.flights.values(), max_deaths=self.max_deaths)

    def aboard(self) -> list[Flight]:
        return [f for f in self.flights.values() if f.ticket is not None]

    def advance(self) -> None:
        depart(self.roster)
        for flight in self.aboard():
            name = flight.request_id
            if len(flight.emitted) == self.poisons.get(name, -1):
                self.die()
                return
            emit(self.roster, flight, 1)
            if len(flight.emitted) == self.lengths[name]:
                self.completed.add(name)
                self.roster.remove(flight)
        self.roster.acquit()
        self.roster.check_integrity()

    def die(self) -> None:
        self.deaths += 1
        culprit = self.roster.engine_died()
        self.roster.check_integrity()
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
        if not len(simulation.roster):
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
            simulation.flights[name] = make_flight(name, 20)
            simulation.roster.add(simulation.flights[name])
        elif len(simulation.roster):
            flight = data.draw(st.sampled_from(list(simulation.roster.flights)))
            simulation.roster.remove(flight)
        simulation.roster.check_integrity()
    for _ in range(5_000):
        if not len(simulation.roster):
            break
        simulation.advance()
    assert not len(simulation.roster)
