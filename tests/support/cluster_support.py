"""A cluster as an ingress hears of it, its engine replicas made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickchange_server.api.openapi.response_models_admin import ClusterDocument
from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus, Residence
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.observability.cluster_metrics import Cluster, Held
from quickchange_server.observability.metrics import Metrics
from quickchange_server.observability.replica_metrics import Kind, snapshot
from quickchange_server.protocol import AdapterMoved, Delta, Ready, StepStats

READY = Ready(2048, 128, 16, 1.5, 10_000, 20_000)
STATS = StepStats(0.02, 12, 4, 8, 3, 8, 2, 40, 10, 100, 200, 1)


class Replica:
    """One made-up replica: its registry, as each has one whatever its kind, and its reports."""

    pid: int | None = None
    in_flight = 10

    def __init__(self, name: str, kind: Kind = "engine", *, state: str = "ready") -> None:
        self.name, self.kind, self.report_state = name, kind, state
        self.residency = AdapterStatus()
        self.metrics = Metrics(Settings(model="fake", store=Path("store")))
        self.metrics.watch(self)
        self._snapshot: bytes | None = None  # None: something has changed
        if kind == "engine":
            self.metrics.engine_started(READY)
            self.metrics.state(STATS)

    def adapters_in_flight(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"orders"}), frozenset({"tickets"})

    def work(self, requests: int = 1, adapter: str = "orders") -> None:
        """Some requests, each with a step."""
        self._snapshot = None
        for _ in range(requests):
            request = self.metrics.request(adapter, True, 7, 0.0)
            request.delta(Delta("a", (1,), cached_tokens=3, queue_seconds=0.2), 1.0)
            request.end("stop", 2.0)
            self.metrics.step(STATS, {}.get)

    def hold(self, digest: str, name: str, size: int = 1000) -> None:
        """Have an adapter version on the device."""
        self._snapshot = None
        self.residency.name(digest, name)
        move = AdapterMoved(digest, "device", "load", 0.01, size)
        self.metrics.adapter_moved(move, self.residency.moved(move))

    def fetch(self, digest: str) -> None:
        """Have an adapter version loaded to the host, which forgets it again."""
        self._snapshot = None
        self.metrics.adapter_moved(AdapterMoved(digest, "host", "load", 0.2, 1000), None)

    def report(self) -> ReplicaReport:
        residency: Mapping[str, Residence] = self.residency.snapshot()
        engine = self.kind == "engine"
        if self._snapshot is None:
            self._snapshot = snapshot(self.metrics.registry, self.name, self.kind)
        return ReplicaReport(
            self.name,
            self.kind,
            "node-1",
            self.report_state,
            READY if engine else None,
            residency,
            running=STATS.running if engine else 0,
            waiting=STATS.waiting if engine else 0,
            running_adapters=self.adapters_in_flight()[0] if engine else (),
            waiting_adapters=self.adapters_in_flight()[1] if engine else (),
            kv_share=0.3125 if engine else 0.0,
            step_seconds=0.02 if engine else 0.0,
            metrics=self._snapshot,
            at=1_800_000_000.0,
        )


class FakeCluster:
    """Replicas that can be changed while a server looks on. `own`: the ingress that answers."""

    def __init__(self, *replicas: Replica, own: str = "ingress-1", wanted: int = 2) -> None:
        self.replicas = list(replicas)
        self.routed: dict[Held, int] = {"device": 80, "loading": 10, "host": 6, "disk": 4}
        self.seen = Cluster(own, self.view, lambda: wanted, lambda: self.routed)

    def view(self) -> ClusterView:
        return ClusterView(tuple(replica.report() for replica in self.replicas), ("d",))


def cluster_answers(*ids: str) -> dict[str, list[Any]]:
    """What an ingress answers to the page, by path: engines by these ids, and an ingress."""
    tier = {"adapters": 40, "used_bytes": 30_000_000, "capacity_bytes": 64_000_000}
    engine = {
        "running": 12,
        "waiting": 3,
        "kv_share": 0.4321,
        "step_seconds": 0.0213,
        "device": tier,
        "host": {**tier, "adapters": 0, "used_bytes": 0},
    }
    replica = {"object": "replica", "node": "node-7f3a", "reported": 1_800_000_000.0}
    engines = [
        {**replica, "id": name, "kind": "engine", "state": "ready", "engine": engine}
        for name in ids
    ]
    ingress = {**replica, "id": "ingress-1", "kind": "ingress", "state": "ready", "engine": None}
    counts = {"ready": len(ids), "wanted": len(ids) + 1}
    told = {
        "object": "cluster",
        "answered_by": "ingress-1",
        "engines": counts,
        "pins": [],
        "data": [*engines, ingress],
    }
    ClusterDocument.model_validate(told)
    return {
        "/health": [200, {"state": "ready", "replicas": counts}],
        "/v1/cluster": [200, told],
    }
