"""Engine replicas without processes, for a cluster's client: they die, drain, stall and refuse.

They say what the fake engine says, several tokens in a delta and several deltas in a batch, at a
pace that the event loop gives.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
from client_support import make_settings
from fake_engine import finish_of, prompt_logprobs_of, read_only, token_at

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.remote import cluster_watch, sequence_run
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.errors import QueueFullError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, Forget, Pin, Prefetch, Ready, Submit, TokenLogprobs

READY = Ready(2048, 128, 16, 0.1, 1 << 20, 1 << 20)
NEVER = 1 << 30  # batches
STALL_TURNS = 20  # of the event loop

End = Literal["loss", "kill", "give back", "refusal", "bug", "early end", "stall"]


@dataclass(frozen=True)
class Fate:
    """What happens to one attempt at a sequence, behind so many of its batches. A kill ends its
    replica, whose place another takes."""

    end: End
    after: int


@dataclass
class FakeReplica:
    name: str
    state: str = "ready"  # "dead" and "giving back" end what runs on it
    info: Ready = READY
    residency: dict[str, Any] = field(default_factory=dict)

    def report(self) -> ReplicaReport:
        return ReplicaReport(self.name, "engine", "node", self.state, self.info, self.residency)


class FakeReplicas:
    """`ReplicaCalls` to them. `fates`: by request id, one for each attempt; then all goes well."""

    def __init__(self, count: int = 3) -> None:
        self.replicas = [FakeReplica(f"engine-{i}") for i in range(count)]
        self.fates: defaultdict[str, deque[Fate]] = defaultdict(deque)
        self.submits: list[Submit] = []
        self.began: list[str] = []  # names of the replicas that had them
        self.running: dict[str, str] = {}  # replica, by submission id
        self.left: list[str] = []  # submission ids of generators that were closed before their end
        self.commands: list[AdapterCommand] = []
        self.pins: dict[str, None] = {}
        self.board = "board-1"
        self.looks = 0
        self.broken = False  # neither a view nor a command comes through
        self.pace_seconds = 0.0

    @property
    def serving(self) -> list[FakeReplica]:
        return [replica for replica in self.replicas if replica.state == "ready"]

    async def generate(self, submit: Submit) -> AsyncGenerator[tuple[Delta, ...], None]:
        if not (serving := self.serving):
            raise ReplicaLostError("there is none", given_back=True)
        index = zlib.crc32(f"{submit.request_id} {len(self.submits)}".encode())
        replica = serving[index % len(serving)]
        self.submits.append(submit)
        self.began.append(replica.name)
        assert submit.request_id not in self.running
        self.running[submit.request_id] = replica.name
        fates = self.fates[submit.request_id.split("/")[0]]
        fate = fates.popleft() if fates else Fate("stall", NEVER)
        try:
            batches = 0
            for batch in _batches(submit):
                await asyncio.sleep(self.pace_seconds)
                _go_on(replica)
                if (
                    fate is not None
                    and batches == fate.after
                    and await self._is_over(fate, replica)
                ):
                    return
                yield batch
                batches += 1
            if batches <= fate.after < NEVER:
                await self._is_over(fate, replica)
        except (GeneratorExit, asyncio.CancelledError):
            self.left.append(submit.request_id)
            raise
        finally:
            del self.running[submit.request_id]

    async def _is_over(self, fate: Fate, replica: FakeReplica) -> bool:
        """Let it happen. True if the stream then ends without a word."""
        match fate.end:
            case "loss":
                raise ReplicaLostError("killed")
            case "kill":
                replica.state = "dead"
                self.replicas.append(FakeReplica(f"engine-{len(self.replicas)}"))
                raise ReplicaLostError("killed with all that it had")
            case "give back":
                raise ReplicaLostError("it drains", given_back=True)
            case "refusal":
                raise QueueFullError("the replica is full", retry_after=3.0)
            case "bug":
                raise ZeroDivisionError("a fault of the transport")
            case "early end":
                return True
            case "stall":
                for _ in range(STALL_TURNS):
                    await asyncio.sleep(0)
                    _go_on(replica)
        return False

    async def command(self, command: AdapterCommand) -> None:
        if self.broken:
            raise ConnectionError("no board")
        self.commands.append(command)
        match command:
            case Pin(digest, True):
                self.pins[digest] = None
            case Pin(digest, False) | Forget(digest):
                self.pins.pop(digest, None)
            case Prefetch():
                pass

    async def view(self) -> ClusterView:
        self.looks += 1
        if self.broken:
            raise ConnectionError("no board")
        reports = [replica.report() for replica in self.replicas if replica.state != "dead"]
        return ClusterView(tuple(reports), tuple(self.pins), self.board)


def _go_on(replica: FakeReplica) -> None:
    if replica.state == "dead":
        raise ReplicaLostError("it is dead")
    if replica.state == "giving back":
        raise ReplicaLostError("it is to end", given_back=True)


def _batches(submit: Submit) -> Iterator[tuple[Delta, ...]]:
    """The deltas of an undisturbed run in batches whose sizes follow from the submission."""
    batch: list[Delta] = []
    for delta in _deltas(submit):
        batch.append(delta)
        if zlib.crc32(repr((submit.request_id, delta.token_ids)).encode()) % 3:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)


def _deltas(submit: Submit) -> Iterator[Delta]:
    """One to three tokens a delta; the end comes with the last of them or by itself."""
    sampling = submit.sampling
    if submit.pooling is not None or not sampling.max_tokens:
        yield read_only(submit)
        return
    position, first = len(submit.output), True
    finish = finish_of(sampling, submit.output[-1], position) if submit.output else None
    while finish is None:
        tokens: list[int] = []
        count = 1 + zlib.crc32(repr((submit.request_id, position)).encode()) % 3
        while finish is None and len(tokens) < count:
            token = token_at(submit.seed, len(submit.prompt) + position, submit.adapters)
            tokens.append(token)
            position += 1
            finish = finish_of(sampling, token, position)
        alone = zlib.crc32(repr((submit.request_id, "end")).encode()) % 2
        wanted = sampling.logprobs is not None
        yield Delta(
            submit.request_id,
            tuple(tokens),
            tuple(TokenLogprobs(t, -1.0) for t in tokens) if wanted else (),
            None if alone else finish,
            cached_tokens=0 if first else None,
            queue_seconds=0.001 if first else None,
            prompt_logprobs=prompt_logprobs_of(submit) if first and not submit.output else (),
        )
        first = False
        if finish is not None and not alone:
            return
    yield Delta(submit.request_id, finish_reason=finish)


@contextmanager
def hurried() -> Iterator[None]:
    """The client's pauses as short as the fakes' lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_watch, "VIEW_SECONDS", 0.005)
        patch.setattr(cluster_watch, "STALE_SECONDS", 0.5)
        patch.setattr(cluster_watch, "PATIENCE_SECONDS", 3.0)
        patch.setattr(cluster_watch, "COMMAND_SECONDS", 0.1)
        patch.setattr(sequence_run, "FIRST_PAUSE_SECONDS", 0.001)
        patch.setattr(sequence_run, "LAST_PAUSE_SECONDS", 0.01)
        yield


@asynccontextmanager
async def cluster_client(
    calls: FakeReplicas, metrics: Metrics | None = None, **changes: Any
) -> AsyncIterator[EngineClient]:
    """A client whose engines are the replicas; at its end no task is left."""
    settings, before = make_settings(**changes), asyncio.all_tasks()
    client = EngineClient(
        settings, metrics or Metrics(settings), partial(RemoteEngines, calls=calls)
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close(drain_seconds=0)
    assert not calls.running
    assert asyncio.all_tasks() == before, "a task is left"


def joined(submits: Sequence[Submit]) -> dict[str, list[Submit]]:
    """The submissions of each request, in order."""
    found: defaultdict[str, list[Submit]] = defaultdict(list)
    for submit in submits:
        found[submit.request_id.split("/")[0]].append(submit)
    return found
