"""Discrete events of a trace on many simulated replicas, under one routing policy.

The policy `affinity` is the router's own code (`routing/`), with residency as old as the replicas'
last reports and each ingress's own memory; queue lengths are exact, as the replicas tell them with
every answer. `random` and `least-loaded` are what it is compared with.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from statistics import fmean
from typing import Literal, Protocol, get_args

from quickchange_server.cluster.routing.placement import DEFAULT_POLICY, Held, PlacementPolicy
from quickchange_server.cluster.routing.routing_memory import RoutedRequest, RoutingMemory
from quickchange_server.cluster.simulation.replica_model import ReplicaModel
from quickchange_server.cluster.simulation.simulated_replica import SimulatedReplica
from quickchange_server.cluster.simulation.traffic import TracedRequest

PolicyName = Literal["affinity", "random", "least-loaded"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterModel:
    """What is simulated."""

    replica: ReplicaModel
    replicas: int
    ingresses: int = 1
    report_seconds: float = 1.0  # between a replica's reports of its residency
    placement: PlacementPolicy = DEFAULT_POLICY


@dataclass(slots=True)
class Outcome:
    """What came of a trace under a policy."""

    policy: PolicyName
    held: Counter[Held] = field(default_factory=Counter)  # requests for adapters, as placed
    held_late: Counter[Held] = field(default_factory=Counter)  # those of the second half
    first_tokens: list[float] = field(default_factory=list)  # seconds from arrival
    store_loads: int = 0
    copies: int = 0
    placed: list[int] = field(default_factory=list)  # requests of each replica
    busy: list[float] = field(default_factory=list)  # seconds of each replica
    seconds: float = 0.0  # until the last token

    @property
    def hit_rate(self) -> float:
        return _rate(self.held)

    @property
    def late_hit_rate(self) -> float:
        return _rate(self.held_late)

    def first_token(self, quantile: float) -> float:
        """Seconds to the first token that this share of the requests don't exceed."""
        ordered = sorted(self.first_tokens)
        return ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]

    @property
    def spread(self) -> float:
        """The busiest replica's work in parts of the mean."""
        mean = fmean(self.busy)
        return max(self.busy) / mean if mean else 1.0


def _rate(held: Counter[Held]) -> float:
    total = sum(held.values())
    return held["device"] / total if total else 1.0


class _Policy(Protocol):
    def choose(self, request: TracedRequest, now: float) -> int: ...

    def queue(self, replica: int, length: int) -> None: ...

    def report(self, replica: int, state: SimulatedReplica, now: float) -> None: ...


class _Random:
    def __init__(self, cluster: ClusterModel) -> None:
        self._draw = random.Random(0)
        self._count = cluster.replicas

    def choose(self, request: TracedRequest, now: float) -> int:  # noqa: ARG002
        return self._draw.randrange(self._count)

    def queue(self, replica: int, length: int) -> None:
        """Not read."""

    def report(self, replica: int, state: SimulatedReplica, now: float) -> None:
        """Not read."""


class _LeastLoaded(_Random):
    """The shortest queue; of several, one at random."""

    def __init__(self, cluster: ClusterModel) -> None:
        super().__init__(cluster)
        self._queues = [0] * cluster.replicas

    def choose(self, request: TracedRequest, now: float) -> int:  # noqa: ARG002
        least = min(self._queues)
        return self._draw.choice([n for n, length in enumerate(self._queues) if length == least])

    def queue(self, replica: int, length: int) -> None:
        self._queues[replica] = length


class _Affinity:
    def __init__(self, cluster: ClusterModel) -> None:
        self._now = 0.0
        self._numbers = {f"engine-{n}": n for n in range(cluster.replicas)}
        self._names = list(self._numbers)
        self._memories = [
            RoutingMemory(cluster.placement, lambda: self._now) for _ in range(cluster.ingresses)
        ]
        for memory in self._memories:
            memory.keep(self._names)
        self._next = 0

    def choose(self, request: TracedRequest, now: float) -> int:
        self._now = now
        memory = self._memories[self._next]
        self._next = (self._next + 1) % len(self._memories)
        routed = _routed(request.adapter, request.prefix, request.prefix_tokens)
        name = memory.order(routed)[0]
        memory.place(routed, name)
        return self._numbers[name]

    def queue(self, replica: int, length: int) -> None:
        for memory in self._memories:
            memory.queue(self._names[replica], length, 0)

    def report(self, replica: int, state: SimulatedReplica, now: float) -> None:
        self._now = now
        stats = {
            "device": " ".join(state.device),
            "host": " ".join(state.host),
            "full": state.full,
            "queue": state.queue,
            "kv_share": state.kv_share,
            "step_seconds": state.step_seconds,
        }
        for memory in self._memories:
            memory.report(self._names[replica], stats)


@lru_cache(maxsize=1 << 16)
def _routed(adapter: str, prefix: str, tokens: int) -> RoutedRequest:
    return RoutedRequest(
        (adapter,) if adapter else (), ((prefix.encode(), tokens),) if prefix else ()
    )


_MAKERS: dict[PolicyName, Callable[[ClusterModel], _Policy]] = {
    "affinity": _Affinity,
    "random": _Random,
    "least-loaded": _LeastLoaded,
}

_REPORT, _STEP, _LOAD = range(3)


def simulate(
    requests: Sequence[TracedRequest], cluster: ClusterModel, policy: PolicyName
) -> Outcome:
    """Replay requests, which are in order of time."""
    return _Run(requests, cluster, policy).outcome()


class _Run:
    def __init__(
        self, requests: Sequence[TracedRequest], cluster: ClusterModel, policy: PolicyName
    ) -> None:
        self._requests = _numbered(requests)
        self._cluster = cluster
        self._policy = _MAKERS[policy](cluster)
        self._replicas = [SimulatedReplica(cluster.replica) for _ in range(cluster.replicas)]
        self._events: list[tuple[float, int, int]] = []  # time, kind, replica
        self._due = [[math.inf] * cluster.replicas for _ in range(3)]  # kind, replica -> time
        self._outcome = Outcome(policy)

    def outcome(self) -> Outcome:
        begin = self._requests[0].time
        half = begin + (self._requests[-1].time - begin) / 2
        for number in range(len(self._replicas)):
            self._schedule(_REPORT, number, begin + self._cluster.report_seconds)
        for request in self._requests:
            self._until(request.time)
            self._arrive(request, late=request.time >= half)
        self._until(math.inf)
        outcome = self._outcome
        outcome.seconds -= begin
        for replica in self._replicas:
            outcome.store_loads += replica.store_loads
            outcome.copies += replica.copies
            outcome.placed.append(replica.placed)
            outcome.busy.append(replica.busy_seconds)
        return outcome

    def _arrive(self, request: TracedRequest, *, late: bool) -> None:
        number = self._policy.choose(request, request.time)
        replica = self._replicas[number]
        if request.adapter:
            held = replica.held(request.adapter)
            self._outcome.held[held] += 1
            self._outcome.held_late[held] += late
        replica.submit(request, request.time)
        self._policy.queue(number, replica.queue)
        self._settle(number)

    def _until(self, time: float) -> None:
        """Let everything happen that is due before `time`.

        A request that comes as a step ends is in the next, whether or not its stretch went on.
        """
        events, due = self._events, self._due
        while events and events[0][0] < time:
            now, kind, number = heappop(events)
            if due[kind][number] != now:
                continue  # put off or brought forward
            due[kind][number] = math.inf
            replica = self._replicas[number]
            if kind == _REPORT:
                self._report(number, now, last=time == math.inf)
                continue
            if kind == _STEP:
                self._outcome.seconds = max(self._outcome.seconds, now)
                replica.step_end()
            else:
                replica.load_end()
            self._settle(number)

    def _report(self, number: int, now: float, *, last: bool) -> None:
        """Let a replica report, and again later, as long as there are requests to route."""
        self._policy.report(number, self._replicas[number], now)
        if not last:
            self._schedule(_REPORT, number, now + self._cluster.report_seconds)

    def _settle(self, number: int) -> None:
        """Take what a replica finished, and note when it goes on."""
        replica = self._replicas[number]
        if replica.finished:
            self._outcome.first_tokens.extend(
                sequence.first - sequence.request.time for sequence in replica.finished
            )
            replica.finished.clear()
            self._policy.queue(number, replica.queue)
        self._schedule(_STEP, number, replica.ends)
        self._schedule(_LOAD, number, replica.loaded)

    def _schedule(self, kind: int, number: int, time: float) -> None:
        if time < math.inf and self._due[kind][number] != time:
            heappush(self._events, (time, kind, number))
        self._due[kind][number] = time


def _numbered(requests: Sequence[TracedRequest]) -> list[TracedRequest]:
    """The requests with adapters' names that can stand side by side in a report."""
    names: dict[str, str] = {"": ""}
    return [r._replace(adapter=names.setdefault(r.adapter, f"a{len(names)}")) for r in requests]
