"""The board of a cluster: what its replicas last said of themselves, and what all of them share.

All of it is soft state. A board that begins anew knows the replicas again after their next
reports, popularity with them; pins after an ingress has seen the board's new id; the counter of
API keys' limits after each ingress's next message. `BoardServer` is the one replica in which Ray
Serve runs it, and that Serve starts again elsewhere when it or its node is lost.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.protocol import Forget, Pin
from quickchange_server.tenants.limit_counter import LimitCounter, LimitMessage, Reply

SILENT_SECONDS = 5.0  # after which a replica is taken for gone
FORGETS_KEPT = 1024  # commands that a replica may still have to hear of


@dataclass(frozen=True, slots=True)
class BoardAnswer:
    """What an engine replica gets for its report.

    `board` and `heard` come with its next one: `forgets` are those versions that are to be dropped
    since then.
    """

    board: str
    heard: int
    pins: tuple[str, ...]
    forgets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Popular:
    """An adapter version that requests have asked for lately, and the device memory it takes; 0
    where no replica holds it."""

    digest: str
    bytes: int


class Board:
    """Not for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.id = uuid.uuid4().hex
        self._clock = clock
        self._reports: dict[str, tuple[float, ReplicaReport, Mapping[str, float]]] = {}
        self._pins: dict[str, None] = {}  # an ordered set
        self._forgets: deque[tuple[int, str]] = deque(maxlen=FORGETS_KEPT)
        self._commands = 0

    def report(
        self, report: ReplicaReport, demand: Mapping[str, float], board: str, heard: int
    ) -> BoardAnswer:
        """Take a replica's report. `demand`: requests for each digest that it had lately."""
        self._reports[report.replica] = (self._clock(), report, demand)
        since = heard if board == self.id else 0
        forgets = tuple(digest for number, digest in self._forgets if number > since)
        return BoardAnswer(self.id, self._commands, tuple(self._pins), forgets)

    def leave(self, replica: str) -> None:
        """Forget a replica that ends."""
        self._reports.pop(replica, None)

    def view(self) -> ClusterView:
        """All replicas that were heard of within SILENT_SECONDS, by kind and label."""
        oldest = self._clock() - SILENT_SECONDS
        self._reports = {k: r for k, r in self._reports.items() if r[0] >= oldest}
        reports = [report for _, report, _ in self._reports.values()]
        reports.sort(key=lambda report: (report.kind, report.replica))
        return ClusterView(tuple(reports), tuple(self._pins), self.id)

    def command(self, command: AdapterCommand) -> None:
        """Note a command that concerns every engine: each hears of it with its next report."""
        match command:
            case Pin(digest, True):
                self._pins[digest] = None
            case Pin(digest, False):
                self._pins.pop(digest, None)
            case Forget(digest):
                self._pins.pop(digest, None)
                self._commands += 1
                self._forgets.append((self._commands, digest))

    def popular(self, most: int) -> tuple[Popular, ...]:
        """The adapter versions that were asked for most, the first foremost."""
        wanted: defaultdict[str, float] = defaultdict(float)
        sizes: dict[str, int] = {}
        for _, report, demand in self._reports.values():
            for digest, count in demand.items():
                wanted[digest] += count
            for digest, residence in report.residency.items():
                if residence.tier == "device":
                    sizes[digest] = residence.bytes
        best = sorted(wanted, key=lambda digest: (-wanted[digest], digest))
        return tuple(Popular(digest, sizes.get(digest, 0)) for digest in best[:most])


class BoardServer:
    """The board, and the counter of API keys' limits, as the only replica of a deployment.

    All methods are coroutines, so that one loop runs them.
    """

    def __init__(self) -> None:
        self._board = Board()
        self._limits = LimitCounter()

    async def report(
        self, report: ReplicaReport, demand: Mapping[str, float], board: str, heard: int
    ) -> BoardAnswer:
        return self._board.report(report, demand, board, heard)

    async def leave(self, replica: str) -> None:
        self._board.leave(replica)

    async def view(self) -> ClusterView:
        return self._board.view()

    async def command(self, command: AdapterCommand) -> None:
        self._board.command(command)

    async def popular(self, most: int) -> tuple[Popular, ...]:
        return self._board.popular(most)

    async def exchange(self, message: LimitMessage) -> Reply:
        return self._limits.exchange(message)
