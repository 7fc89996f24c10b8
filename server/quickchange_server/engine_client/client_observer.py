"""What the engine's client tells whoever counts: of requests, of the engine, of adapters.

Protocols alone, so that the client knows no metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from quickchange_server.engine_client.adapter_status import Residences
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
Refusal = Literal["queue_full", "unavailable"]


class ServerState(Protocol):
    """What can be read of the client at any time. All of it is cheap."""

    @property
    def in_flight(self) -> int:
        """Requests admitted and not ended."""
        ...

    @property
    def info(self) -> Ready | None: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def residency(self) -> Residences: ...


class SequenceObserver(Protocol):
    """Is told of one admitted sequence. Times are monotonic seconds."""

    @property
    def started(self) -> bool:
        """A delta has come."""
        ...

    def delta(self, delta: Delta, now: float) -> None: ...

    def end(self, outcome: Outcome, now: float) -> None: ...


class ClientObserver(Protocol):
    """Is told of everything else."""

    def watch(self, state: ServerState) -> None: ...

    def request(
        self, label: str, adapted: bool, prompt_tokens: int, now: float
    ) -> SequenceObserver:
        """A sequence is admitted. `label` is its adapter's name, unused where not `adapted`."""
        ...

    def drafting(self, drafting: Drafting) -> None:
        """It is one whose tokens are drafted ahead."""

    def refused(self, reason: Refusal) -> None: ...

    def resubmitted(self) -> None: ...

    def step(self, stats: StepStats, name_of: Callable[[str], str | None]) -> None: ...

    def engine_started(self, ready: Ready) -> None: ...

    def engine_died(self) -> None: ...

    def adapter_moved(self, event: AdapterMoved, before: Tier | None) -> None: ...

    def adapter_failed(self) -> None: ...
