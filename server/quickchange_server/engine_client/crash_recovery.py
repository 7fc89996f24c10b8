"""Recovery from engine crashes: which requests go to the next engine, and which one is to blame.

After a crash, all requests that the engine had are submitted to the next one at once. A request
that was present at too many crashes becomes a suspect. Suspects are tried one at a time, alone: if
the engine dies during such a trial, the suspect is the culprit and is given up, and the other
requests, whose crashes it explains, run together again. Processes and clocks are not known here.
"""

from __future__ import annotations

from collections.abc import Collection

from quickchange_server.engine_client.in_flight_request import InFlightRequest

# A suspect is cleared once it has emitted this many tokens past the point of the last crash: a
# sampled token depends on (seed, position) alone, so a request that ends an engine does so at the
# same position again. An engine is at most a few steps ahead of the tokens received, and a step
# emits one token and the accepted drafts, whose number may differ from run to run.
CLEARED_AFTER_TOKENS = 20


class CrashRecovery:
    """All requests in flight: those the engine has, and those that wait for it or for a trial.

    A request with `max_deaths - 1` deaths is tried alone until it is cleared, one with more until
    it ends. This bounds the crashes that any one request, and so all of them, can cause.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._suspect_at = max(1, max_deaths - 1)
        self._requests: dict[str, InFlightRequest] = {}  # by request id, in order of arrival
        self._waiting: dict[str, InFlightRequest] = {}  # by request id
        self._submitted: dict[str, InFlightRequest] = {}  # by submission id
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

    def find(self, submission_id: str) -> InFlightRequest | None:
        """The request that the current engine has under `submission_id`."""
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
        """The requests to submit now; call `submitted` for each once it has its submission id."""
        if self._on_trial is not None:
            return []
        suspects = self._waiting_suspects()
        if not suspects:
            return list(self._waiting.values())
        # The suspect that made the least progress is the likeliest culprit.
        self._on_trial = min(suspects, key=lambda request: request.progress)
        return [self._on_trial]

    def submitted(self, request: InFlightRequest) -> None:
        """Note that the engine has `request`, under `request.submission_id`."""
        assert request.submission_id is not None
        del self._waiting[request.request_id]
        self._submitted[request.submission_id] = request

    def acquit(self) -> str | None:
        """End the trial if its request has run past the point of the last crash.

        If further suspects wait, returns the submission id to cancel: the cleared request then
        waits, so that the next suspect runs alone too. Otherwise it runs on.
        """
        request = self._on_trial
        if request is None or request.deaths >= self._max_deaths:
            return None
        if request.progress < CLEARED_AFTER_TOKENS:
            return None
        request.cleared = True
        if not self._waiting_suspects():
            self._on_trial = None
            return None
        submission_id = request.submission_id
        self._withdraw(request)
        self._waiting[request.request_id] = request
        return submission_id

    def engine_died(self) -> InFlightRequest | None:
        """Count a death for every submitted request and queue it again. Returns the culprit, if
        this death has identified it."""
        culprit = self._on_trial
        for request in self._submitted.values():
            request.deaths += 1
            request.submission_id = None
        self._submitted.clear()
        self._on_trial = None
        if culprit is not None:
            del self._requests[culprit.request_id]
            for request in self._requests.values():
                request.deaths = 0
                request.cleared = False
        self._waiting = dict(self._requests)
        return culprit

    @property
    def any_submitted(self) -> bool:
        return bool(self._submitted)

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
            assert submitted == {self._on_trial.request_id}

    def _withdraw(self, request: InFlightRequest) -> None:
        if request.submission_id is not None:
            self._submitted.pop(request.submission_id, None)
            request.submission_id = None
        if self._on_trial is request:
            self._on_trial = None

    def _waiting_suspects(self) -> list[InFlightRequest]:
        return [request for request in self._waiting.values() if self._is_suspect(request)]

    def _is_suspect(self, request: InFlightRequest) -> bool:
        if request.deaths >= self._max_deaths:
            return True
        return request.deaths >= self._suspect_at and not request.cleared
