"""The engines behind a client: what it asks of them, wherever they run.

`local/` has the engine process of this machine, `remote/` replicas elsewhere. A client makes its
engines by an `EnginesMaker`, and knows nothing else of either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Literal, Protocol

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.engine_client.client_observer import EngineObserver
from quickchange_server.engine_client.in_flight_request import InFlightRequest
from quickchange_server.protocol import Forget, Pin, Prefetch, Ready, Submit

Phase = Literal["starting", "ready", "restarting", "failed", "stopped"]
AdapterCommand = Prefetch | Pin | Forget

# Called with a sequence that has had its last delta or its error, and monotonic seconds.
Ended = Callable[[InFlightRequest, float], None]


class Engines(Protocol):
    """One or more engines, from `start` to `stop`. Used from one event loop.

    They hand deltas to the sequences that were submitted, and see to it that each goes on where it
    stood if its engine is lost. `requests` are those that have not ended, oldest first.
    """

    @property
    def phase(self) -> Phase:
        """While "restarting", sequences are taken and wait for an engine."""
        ...

    @property
    def failure(self) -> str | None:
        """The reason of the phase "failed"."""
        ...

    @property
    def seconds_to_ready(self) -> float:
        """Seconds until an engine should be ready, if none is; a guess."""
        ...

    @property
    def info(self) -> Ready | None:
        """What the last engine that started said of itself; None before the first."""
        ...

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while there is none on this machine."""
        ...

    @property
    def residency(self) -> AdapterStatus:
        """Adapter versions on the device or host tier, by digest."""
        ...

    @property
    def requests(self) -> Collection[InFlightRequest]: ...

    async def start(self) -> Ready:
        """Wait for the first engine. Raises EngineFailedError, with its reason, if none can be."""
        ...

    async def stop(self) -> None:
        """End what was started; no delta follows. May be called again."""

    def check(self, submits: Iterable[Submit]) -> None:
        """Raise RequestFailedError if one of them is known to end engines."""

    def submit(self, *requests: InFlightRequest) -> None:
        """Run all of these sequences or none. Raises ValueError if the id of one is in flight."""

    def cancel(self, request: InFlightRequest) -> None:
        """Take back a sequence, which its client ends."""

    def command(self, command: AdapterCommand) -> None:
        """Have adapter versions loaded, pinned or dropped. Pins outlive engines, and a prefetch
        waits for one."""


EnginesMaker = Callable[[Settings, EngineObserver, Ended], Engines]
