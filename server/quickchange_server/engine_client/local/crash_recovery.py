"""Recovery from engine crashes: which requests go to the next engine, and which one is to blame.

After a crash some of the engine's requests are suspects, the others go to the next engine at once.
A suspect is tried alone: in an engine of its own if there is one, beside the engine that serves the
others, else in that engine, for which the others wait. So whoever is innocent stalls once. A trial
ends the suspicion when the suspect has got past the point of the crash. A suspect that has been
present at too many deaths, the last one alone, is given up. Processes and clocks are not known
here.
"""

from __future__ import annotations

from collections.abc import Collection

from quickchange_server.engine_client.in_flight_request import InFlightRequest


class CrashRecovery:
    """All requests in flight: those that an engine has, and those that wait for it or for a trial.

    A sampled token depends on (seed, position) alone, so a request that ends an engine does so at
    the same position again. Suspects are therefore those that were not yet past their first
    tokens; where an engine's own work ended it and all were, all that it had worked on; and any
    that has been present at two deaths since it last got on.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self.apart = True  # trials have an engine of their own
        self._requests: dict[str, InFlightRequest] = {}  # by request id, in order of arrival
        self._waiting: dict[str, InFlightRequest] = {}  # by request id
        self._submitted: dict[str, InFlightRequest] = {}  # by submission id, that on trial too
        self._on_trial: InFlightRequest | None = None

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> Collection[InFlightRequest]:
        return self._requests.values()

    @property
    def on_trial(self) -> InFlightRequest | None:
        """The suspect that runs alone, if any."""
        return self._on_trial

    @property
    def suspects_wait(self) -> bool:
        return any(request.suspect for request in self._waiting.values())

    @property
    def any_submitted(self) -> bool:
        """True if the engine that serves has a request."""
        return bool(self._aboard())

    def find(self, submission_id: str) -> InFlightRequest | None:
        """The request that an engine has under `submission_id`."""
        return self._submitted.get(submission_id)

    def add(self, *requests: InFlightRequest) -> None:
        """Admit all requests or none. Raises ValueError if the id of one is already in flight."""
        arriving = {request.request_id: request for request in requests}
        for request_id in arriving:
            if request_id in self._requests:
                raise ValueError(f"request id {request_id!r} is already in flight")
        self._requests |= arriving
        self._waiting |= arriving

    def remove(self, request: InFlightRequest) -> None:
        """Remove a request that has ended."""
        self._requests.pop(request.request_id, None)
        self._waiting.pop(request.request_id, None)
        self._withdraw(request)

    def to_submit(self) -> list[InFlightRequest]:
        """The requests that the serving engine gets now; call `submitted` for each, once it has its
        submission id."""
        if not self.apart and (self._on_trial is not None or self.suspects_wait):
            return []
        return [request for request in self._waiting.values() if not request.suspect]

    def to_try(self) -> InFlightRequest | None:
        """The suspect to try now, if any; call `tried`, once it has its submission id."""
        if self._on_trial is not None or (not self.apart and self._submitted):
            return None
        suspects = [request for request in self._waiting.values() if request.suspect]
        # Likeliest to be the culprit: the one that has died alone, then that with least progress.
        return min(suspects, key=lambda one: (-one.deaths, one.progress), default=None)

    def submitted(self, request: InFlightRequest) -> None:
        """Note that an engine has `request`, under `request.submission_id`."""
        assert request.submission_id is not None
        del self._waiting[request.request_id]
        self._submitted[request.submission_id] = request

    def tried(self, request: InFlightRequest) -> None:
        """Note that `request` runs alone, under `request.submission_id`."""
        self.submitted(request)
        self._on_trial = request

    def began(self, submission_id: str) -> None:
        """Note that an engine has begun to work on a request."""
        if (request := self._submitted.get(submission_id)) is not None:
            request.begun = True

    def acquit(self) -> str | None:
        """End the trial if its request has got past the point of the crash.

        Returns its submission id where that is to be cancelled, since the request then waits for
        the serving engine, or for the trials of the others.
        """
        request = self._on_trial
        if request is None or request.progress < request.telling:
            return None
        request.suspect = False
        request.deaths = 0
        self._on_trial = None
        if not self.apart and not self.suspects_wait:
            return None
        submission_id = request.submission_id
        self._withdraw(request)
        self._waiting[request.request_id] = request
        return submission_id

    def recall(self) -> list[str]:
        """Make all requests wait that the serving engine has. Returns their submission ids, to be
        cancelled."""
        ids = [r.submission_id for r in self._aboard() if r.submission_id is not None]
        self._all_wait()
        return ids

    def engine_died(self, *, outside: bool) -> InFlightRequest | None:
        """Queue the serving engine's requests again, and decide whom to suspect. Returns the
        culprit, if this death has identified it. outside: the engine's own work did not end it."""
        if not self.apart and self._on_trial is not None:
            return self.trial_died()
        aboard = self._aboard()
        new = [request for request in aboard if request.begun and request.is_new]
        begun = [request for request in aboard if request.begun]
        blamed = new or ([] if outside else begun or aboard)
        for request in aboard:
            request.count_death()
            request.suspect = request in blamed or request.deaths > 1
        self._all_wait()
        return None

    def trial_died(self) -> InFlightRequest | None:
        """Count the death of an engine that ran a suspect alone. Returns the suspect, no longer in
        flight, if it is given up."""
        request = self._on_trial
        if request is None:
            return None
        request.deaths += 1
        self._withdraw(request)
        if request.deaths >= self._max_deaths:
            del self._requests[request.request_id]
            return request
        self._waiting[request.request_id] = request
        return None

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent."""
        submitted = {request.request_id for request in self._submitted.values()}
        assert submitted | set(self._waiting) == set(self._requests)
        assert not submitted & set(self._waiting)
        assert all(
            request.submission_id == submission_id
            for submission_id, request in self._submitted.items()
        )
        assert all(request.submission_id is None for request in self._waiting.values())
        if self._on_trial is not None:
            assert self._on_trial.request_id in submitted
            assert self.apart or len(submitted) == 1
        assert not any(request.suspect for request in self._aboard()) or not self.apart

    def _aboard(self) -> list[InFlightRequest]:
        """The serving engine's requests."""
        every = self._submitted.values()
        return [request for request in every if not self.apart or request is not self._on_trial]

    def _all_wait(self) -> None:
        for request in self._aboard():
            self._withdraw(request)
        submitted = {request.request_id for request in self._submitted.values()}
        # In order of arrival.
        self._waiting = {key: r for key, r in self._requests.items() if key not in submitted}

    def _withdraw(self, request: InFlightRequest) -> None:
        if request.submission_id is not None:
            self._submitted.pop(request.submission_id, None)
            request.submission_id = None
        if self._on_trial is request:
            self._on_trial = None
