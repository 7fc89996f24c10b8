"""Which admitted requests an engine gets, and which one is to blame when engines die.

After a death everything that was with the engine is handed to the next one at once. A request that
was there at too many deaths is a suspect: suspects are tried one at a time with nothing beside
them, so that the culprit is the one with which an engine dies alone. It is given up, and the
others, whose deaths it explains, are together again. Knows nothing of processes or clocks.
"""

from __future__ import annotations

from collections.abc import Collection

from quickchange_server.engine_client.in_flight_request import Flight

# A suspect is cleared once it has emitted this many tokens past the point at which the engine
# died: a sampled token depends on (seed, position) alone, so a request that ends an engine does it
# at the same place again. An engine is at most a few steps ahead of what was received, each of
# them one token and the accepted drafts, whose number may differ from the last time.
CLEARED_AFTER_TOKENS = 20


class Roster:
    """All requests in flight: those with the engine, and those that wait for it or for a trial.

    A flight with `max_deaths - 1` deaths is tried alone until it is cleared, one with more until
    it ends; so the number of deaths of any request is bounded, and so is that of all of them.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._suspect_at = max(1, max_deaths - 1)
        self._flights: dict[str, Flight] = {}  # by request id, in order of arrival
        self._waiting: dict[str, Flight] = {}  # by request id
        self._aboard: dict[str, Flight] = {}  # by ticket
        self._on_trial: Flight | None = None

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def flights(self) -> Collection[Flight]:
        return self._flights.values()

    @property
    def on_trial(self) -> Flight | None:
        """The suspect that has the engine to itself."""
        return self._on_trial

    def find(self, ticket: str) -> Flight | None:
        """The flight that the current engine knows by `ticket`."""
        return self._aboard.get(ticket)

    def add(self, *flights: Flight) -> None:
        """Admit flights, all or, where the id of one is in flight already (ValueError), none."""
        arriving = {flight.request_id: flight for flight in flights}
        for request_id in arriving:
            if request_id in self._flights:
                raise ValueError(f"request id {request_id!r} is already in flight")
        self._flights |= arriving
        self._waiting |= arriving

    def remove(self, flight: Flight) -> None:
        """Take a flight that has ended off the roster."""
        self._flights.pop(flight.request_id, None)
        self._waiting.pop(flight.request_id, None)
        self._disembark(flight)

    def departures(self) -> list[Flight]:
        """The flights to submit now; call `boarded` for each once it has its ticket."""
        if self._on_trial is not None:
            return []
        suspects = self._waiting_suspects()
        if not suspects:
            return list(self._waiting.values())
        # One that got nowhere with the last engine is likelier to be what ended it.
        self._on_trial = min(suspects, key=lambda flight: flight.progress)
        return [self._on_trial]

    def boarded(self, flight: Flight) -> None:
        """The engine has `flight`, under `flight.ticket`."""
        assert flight.ticket is not None
        del self._waiting[flight.request_id]
        self._aboard[flight.ticket] = flight

    def acquit(self) -> str | None:
        """End the trial if its flight is cleared.

        Returns the ticket to cancel where further suspects wait: the cleared flight waits with the
        others then, so that the next is alone too. Otherwise it simply goes on.
        """
        flight = self._on_trial
        if flight is None or flight.deaths >= self._max_deaths:
            return None
        if flight.progress < CLEARED_AFTER_TOKENS:
            return None
        flight.cleared = True
        if not self._waiting_suspects():
            self._on_trial = None
            return None
        ticket = flight.ticket
        self._disembark(flight)
        self._waiting[flight.request_id] = flight
        return ticket

    def engine_died(self) -> Flight | None:
        """Count the death for those aboard, who wait again. Returns the culprit if it is found."""
        culprit = self._on_trial
        for flight in self._aboard.values():
            flight.deaths += 1
            flight.ticket = None
        self._aboard.clear()
        self._on_trial = None
        if culprit is not None:
            del self._flights[culprit.request_id]
            for flight in self._flights.values():
                flight.deaths = 0
                flight.cleared = False
        self._waiting = dict(self._flights)
        return culprit

    @property
    def anything_aboard(self) -> bool:
        return bool(self._aboard)

    def check_integrity(self) -> None:
        """Raise AssertionError where the roster contradicts itself."""
        aboard = {flight.request_id for flight in self._aboard.values()}
        assert aboard | set(self._waiting) == set(self._flights)
        assert not aboard & set(self._waiting)
        assert all(flight.ticket == ticket for ticket, flight in self._aboard.items())
        assert all(flight.ticket is None for flight in self._waiting.values())
        if self._on_trial is not None:
            assert aboard == {self._on_trial.request_id}

    def _disembark(self, flight: Flight) -> None:
        if flight.ticket is not None:
            self._aboard.pop(flight.ticket, None)
            flight.ticket = None
        if self._on_trial is flight:
            self._on_trial = None

    def _waiting_suspects(self) -> list[Flight]:
        return [flight for flight in self._waiting.values() if self._is_suspect(flight)]

    def _is_suspect(self, flight: Flight) -> bool:
        if flight.deaths >= self._max_deaths:
            return True
        return flight.deaths >= self._suspect_at and not flight.cleared
