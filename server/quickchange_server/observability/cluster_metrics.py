"""Metrics of a cluster that no single machine has: routing, streams that changed their replica,
and the replicas themselves.

An ingress has them in its registry once it has joined a cluster, and tells every replica's series.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from quickchange_server.engine_client.client_observer import Interruption
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.observability.gateways.resident_adapters import LabelOf, Told, resident
from quickchange_server.observability.replica_metrics import exposition, merged
from quickchange_server.protocol import Tier

Held = Literal["device", "loading", "host", "disk"]  # where a replica has a request's adapters
RESULTS: Mapping[Held, str] = {
    "device": "device",
    "loading": "loading",  # an earlier request brings them there
    "host": "host",
    "disk": "cold",
}

# From a hand-over between two that are idle to the load of an adapter and a long prompt.
PAUSE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What an ingress knows of its cluster. Each call answers at once, on any thread."""

    replica: str  # the ingress' own label
    view: Callable[[], ClusterView]  # as last heard of
    wanted: Callable[[], int]  # engine replicas that there should be
    routed: Callable[[], Mapping[Held, int]]  # requests for adapters that this ingress has routed

    def counts(self) -> dict[str, int]:
        """Engine replicas that are ready, and those that there should be."""
        ready = sum(report.serves for report in self.view().replicas)
        return {"ready": ready, "wanted": self.wanted()}

    def tiers(self, digest: str) -> dict[str, Tier]:
        """The tier of an adapter version on each replica that has it in memory."""
        there = {r.replica: r.residency.get(digest) for r in self.view().replicas}
        return {replica: found.tier for replica, found in there.items() if found is not None}


class StreamMetrics:
    """Streams that went on at another replica; exported once they are registered."""

    def __init__(self) -> None:
        self._resumes = Counter(
            "quickchange_stream_resumes_total",
            "Streams that went on at another replica, by why they left theirs",
            ["reason"],
            registry=None,
        )
        self._pauses = Histogram(
            "quickchange_stream_pause_seconds",
            "Time without a token of streams that went on at another replica",
            buckets=PAUSE_BUCKETS,
            registry=None,
        )

    def register(self, registry: CollectorRegistry) -> None:
        registry.register(self._resumes)
        registry.register(self._pauses)

    def resumed(self, reason: Interruption, pause_seconds: float) -> None:
        """Count a stream at its first token from another replica."""
        self._resumes.labels(reason).inc()
        self._pauses.observe(pause_seconds)


class IngressCollector(Collector):
    """An ingress' requests, and where it has routed them; read at each scrape."""

    def __init__(self, in_flight: Callable[[], int], cluster: Cluster) -> None:
        self._in_flight = in_flight
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "quickchange_ingress_requests",
            "Requests that an ingress has admitted and that have not ended",
            value=self._in_flight(),
        )
        routed = self._cluster.routed()
        family = CounterMetricFamily(
            "quickchange_routing",
            "Requests for adapters by where the chosen replica had these",
            labels=["result"],
        )
        for held, result in RESULTS.items():
            family.add_metric([result], routed.get(held, 0))
        yield family


def _of_all(view: ClusterView, wanted: int, label_of: LabelOf) -> Iterator[Metric]:
    """What the reports of all replicas say together: told by the ingress that is asked."""
    yield _replicas(view)
    yield GaugeMetricFamily(
        "quickchange_cluster_engines_wanted",
        "Engine replicas that there should be",
        value=wanted,
    )
    yield from resident({r.replica: r.residency for r in view.replicas}, label_of)


def _replicas(view: ClusterView) -> Metric:
    """The cluster's count, so without a replica's label."""
    family = GaugeMetricFamily(
        "quickchange_cluster_replicas",
        "Replicas that were heard of lately",
        labels=["kind", "state"],
    )
    states = Tally((report.kind, report.state) for report in view.replicas)
    for (kind, state), count in sorted(states.items()):
        family.add_metric([kind, state], count)
    return family


def exposition_of_all(
    registry: Collector, cluster: Cluster, label_of: LabelOf, more: Iterable[Metric] = ()
) -> bytes:
    """The series of all replicas that the cluster knows, this one's as they are now, and `more`,
    which are the whole cluster's."""
    view = cluster.view()
    others = {r.replica: r.metrics for r in view.replicas if r.replica != cluster.replica}
    series = merged(exposition(registry, cluster.replica, "ingress"), others.values())
    told = _of_all(view, cluster.wanted(), label_of)
    return series + generate_latest(Told(told, more))
