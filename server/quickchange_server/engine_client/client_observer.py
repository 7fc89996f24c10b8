"""Protocols for observers of the engine client: events of requests, engine and adapters.

The client depends on these and not on the metrics that implement them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.protocol import (
    AdapterMoved,
    Delta,
    Drafting,
    FinishReason,
    Ready,
    StepStats,
    Tier,
)

Outcome = FinishReason | Literal["adapter_failed", "request_failed", "engine_failed", "unavailable"]
Refusal = Literal["queue_full", "unavailable", "given_up"]
Interruption = Literal["lost", "drained"]  # why a sequence left its replica: it died, or ends


class ServerState(Protocol):
    """Client state that can be read cheaply at any time."""

    @property
    def in_flight(self) -> int:
        """Number of requests admitted and not ended."""
        ...

    @property
    def pid(self) -> int | None: ...

    @property
    def residency(self) -> AdapterStatus: ...

    def adapters_in_flight(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the adapters of running requests, and of those that only waiting ones have."""
        ...


class SequenceObserver(Protocol):
    """Receiver of one admitted sequence's events. Times are monotonic seconds."""

    @property
    def started(self) -> bool:
        """True once a delta has arrived."""
        ...

    def delta(self, delta: Delta, now: float) -> None: ...

    def end(self, outcome: Outcome, now: float) -> None: ...


class EngineObserver(Protocol):
    """Receiver of the engines' events."""

    def resubmitted(self) -> None:
        """A sequence goes on with another engine."""

    def resumed(self, reason: Interruption, pause_seconds: float) -> None:
        """A sequence has its first delta from another replica, so long after the last one."""

    def step(self, stats: StepStats, name_of: Callable[[str], str | None]) -> None: ...

    def state(self, stats: StepStats) -> None:
        """The engine's state between steps; the figures of a step are 0."""

    def engine_started(self, ready: Ready) -> None: ...

    def engine_died(self) -> None: ...

    def trial_died(self) -> None:
        """An engine that ran a suspect alone has died."""

    def adapter_moved(self, event: AdapterMoved, before: Tier | None) -> None: ...

    def adapter_failed(self) -> None: ...


class ClientObserver(EngineObserver, Protocol):
    """Receiver of all events of a client."""

    def watch(self, state: ServerState) -> None:
        """Called once, with the client itself."""

    def request(
        self, label: str, adapted: bool, prompt_tokens: int, now: float
    ) -> SequenceObserver:
        """A sequence is admitted. `label` is its adapter's name, unused unless `adapted`."""
        ...

    def drafting(self, drafting: Drafting) -> None:
        """The sequence about to be admitted uses speculative decoding."""

    def refused(self, reason: Refusal) -> None: ...
