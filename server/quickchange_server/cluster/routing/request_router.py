"""Routing behind Ray Serve's interface: `RequestRouter`, as Serve 2.60 calls it.

Serve makes one for each handle's process and calls every method on one event loop, which may be
that of a thread of its own; others read the counts (`routing_memory.ROUTED`) alone.

The length of a replica's queue is Serve's own figure, which the replica tells with its answer to
each request, and its report where that is too old. What was decided and not yet sent is added:
of a burst all are decided before the first is sent.

Serve tells pending requests apart by an id that all calls from one HTTP request share, and would
never fulfil the second of two choices of a completion; here each is known by its metadata object.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from ray.serve._private.common import RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from quickchange_server.cluster.routing import routing_memory
from quickchange_server.cluster.routing.placement import Held, PlacementPolicy
from quickchange_server.cluster.routing.routing_memory import RoutedRequest, RoutingMemory, routed

_UNSENT_SECONDS = 1.0  # a choice older than this was never sent


class _Choice(NamedTuple):
    """What was decided for a request; kept on its `routing_context` until one accepts it."""

    request: RoutedRequest
    replica: str
    held: Held = "disk"


class AdapterRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Serve's router that knows where adapters and prefixes are."""

    def initialize_state(self, **policy: float) -> None:
        """Take the fields of `PlacementPolicy`, from Serve's `request_router_kwargs`."""
        self._memory = RoutingMemory(PlacementPolicy(**policy), self._get_curr_time_s)
        self._pending: WeakValueDictionary[int, PendingRequest] = WeakValueDictionary()
        self._unsent: dict[str, deque[float]] = {}  # replica -> when it was chosen

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that there are, with what they report."""
        self._memory.keep([replica.replica_id.unique_id for replica in replicas])
        for replica in replicas:
            self._memory.report(replica.replica_id.unique_id, replica.routing_stats)
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that is gone."""
        super().on_replica_actor_died(replica_id)
        self._memory.keep([known.unique_id for known in self._replicas])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All replicas, one a rank: Serve takes the first whose queue isn't full."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        self._pending[id(pending_request.metadata)] = pending_request
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        for name, replica in by_name.items():
            self._note_queue(name, replica.replica_id)
        request = _read(pending_request)
        names = [name for name in self._memory.order(request) if name in by_name]
        self._choose(pending_request, request, names[0])
        return [[by_name[name]] for name in names]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a sent request in Serve's figure instead of ours."""
        super().on_send_request(replica_id)
        if unsent := self._unsent.get(replica_id.unique_id):
            unsent.popleft()

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,  # noqa: ARG002
    ) -> None:
        """Count a request that a replica has accepted."""
        name = replica_id.unique_id
        request, chosen, held = _choice(pending_request) or _Choice(_read(pending_request), "")
        if chosen != name:
            if replica_id not in self._replicas:
                return
            held = self._memory.place(request, name)
        if request.digests and request.sequence:
            # By its module: Serve pickles this one by value, with a copy of any object it names.
            routing_memory.ROUTED.add(held)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        pending = self._pending.get(id(request_metadata))
        return None if pending is None or pending.future.done() else pending

    def _note_queue(self, name: str, replica_id: ReplicaID) -> None:
        unsent = self._unsent.get(name)
        while unsent and unsent[0] < self._get_curr_time_s() - _UNSENT_SECONDS:
            unsent.popleft()
        told = self.replica_queue_len_cache.get(replica_id)
        self._memory.queue(name, told, len(unsent or ()))

    def _choose(self, pending: PendingRequest, request: RoutedRequest, name: str) -> None:
        before = _choice(pending)
        if before is not None and before.replica == name:
            return
        held = self._memory.place(request, name)
        pending.routing_context.quickchange = _Choice(request, name, held)
        self._unsent.setdefault(name, deque()).append(self._get_curr_time_s())


def _choice(pending: PendingRequest) -> _Choice | None:
    return getattr(pending.routing_context, "quickchange", None)


def _read(pending: PendingRequest) -> RoutedRequest:
    args: list[Any] = [*pending.args, *pending.kwargs.values()]
    return routed(args[0] if args else None)
