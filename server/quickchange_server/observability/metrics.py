"""Prometheus metrics of the server: names, buckets, and the observer that updates them.

Names start with `quickchange_`; values are in base units. Each `Metrics` has its own registry, so
that several servers fit into one process. Updates happen on the event loop; `render` may run on
any thread. Neither HTTP nor the engine's process is known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.process_collector import ProcessCollector

from quickchange_server.config import Settings
from quickchange_server.engine_client.client_observer import (
    Interruption,
    Outcome,
    Refusal,
    ServerState,
)
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.observability.cluster_metrics import (
    Cluster,
    IngressCollector,
    StreamMetrics,
    exposition_of_all,
)
from quickchange_server.observability.engine_collector import EngineTotals, StateCollector
from quickchange_server.observability.gateways.resident_adapters import LabelOf, Told, resident
from quickchange_server.observability.gateways.vllm_metrics import EngineLoad, vllm_families
from quickchange_server.observability.http_metrics import HttpMetrics
from quickchange_server.observability.naming.labels import BASE, OTHER, AdapterLabels
from quickchange_server.observability.speculation_metrics import NameOf, SpeculationMetrics
from quickchange_server.observability.subsystem_metrics import StructuredMetrics
from quickchange_server.protocol import AdapterMoved, Delta, Drafting, Ready, StepStats, Tier

# Buckets range from a small model on a GPU (steps under 1 ms) to a large one on two CPU cores.
# fmt: off
STEP_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)
WAIT_BUCKETS = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)
REQUEST_BUCKETS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)
LOAD_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)
# fmt: on
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
ADAPTER_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """All metrics of one server."""

    def __init__(self, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        self._settings = settings
        self._state: StateCollector | None = None  # None: nothing to watch yet
        self._labels = AdapterLabels(settings.metrics_adapters)
        self._series: dict[str, AdapterSeries] = {}  # by label value
        self._totals = EngineTotals()
        self._families = _RequestFamilies(self.registry)
        self.http = HttpMetrics(self.registry)
        self._speculation = SpeculationMetrics(self.registry, self._labels)
        self.structured = StructuredMetrics(self.registry)
        self._streams = StreamMetrics()
        self._make_step_metrics()
        self._make_adapter_metrics()
        self._make_engine_metrics()

    def _make_step_metrics(self) -> None:
        self._step_seconds = self._histogram(
            "step_duration_seconds", "Time of one engine step", STEP_BUCKETS
        )
        self._rows = self._histogram("batch_rows", "Token rows of one engine step", ROW_BUCKETS)
        self._sequences = self._histogram(
            "batch_sequences", "Sequences of one engine step", SEQUENCE_BUCKETS
        )
        self._distinct = self._histogram(
            "batch_adapters", "Distinct adapter versions of one engine step", ADAPTER_BUCKETS
        )
        self._prefill_rows = self._counter("prefill_rows_total", "Token rows that were prompt")

    def _make_adapter_metrics(self) -> None:
        self._load_seconds = Histogram(
            "quickchange_adapter_load_seconds",
            "Time to bring an adapter version to a tier from the one below",
            ["tier"],
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self._loads = self._counter("adapter_loads_total", "Adapter loads to a tier", "tier")
        self._load_bytes = self._counter(
            "adapter_load_bytes_total", "Bytes of adapter loads to a tier", "tier"
        )
        self._evictions = self._counter(
            "adapter_evictions_total", "Adapter versions pushed out of a tier", "tier"
        )
        self._load_failures = self._counter(
            "adapter_load_failures_total", "Adapter versions that could not be loaded"
        )

    def _make_engine_metrics(self) -> None:
        self._refused = self._counter(
            "requests_rejected_total", "Requests turned away at the door", "reason"
        )
        self._restarts = self._counter("engine_restarts_total", "Engines that died")
        self._resubmitted = self._counter(
            "requests_resubmitted_total", "Requests handed to another engine, tokens and all"
        )
        self._up = Gauge(
            "quickchange_engine_up", "1 while an engine takes requests", registry=self.registry
        )
        self._start_seconds = Gauge(
            "quickchange_engine_start_seconds",
            "Time the last engine took to load the model",
            registry=self.registry,
        )
        ProcessCollector(namespace="quickchange_api", registry=self.registry)

    def watch(self, state: ServerState) -> None:
        """Read gauges from `state` at each scrape. Called once."""
        self._state = StateCollector(state, self._totals)
        self.registry.register(self._state)
        ProcessCollector(
            namespace="quickchange_engine",
            pid=lambda: state.pid or "none",
            registry=self.registry,
        )

    def join(self, cluster: Cluster, state: ServerState) -> None:
        """Export what only an ingress of a cluster has. Called once at most."""
        self._streams.register(self.registry)
        self.registry.register(IngressCollector(lambda: state.in_flight, cluster))

    def request(self, label: str, adapted: bool, prompt_tokens: int, now: float) -> RequestMetrics:
        """Start counting a request. `label` is its adapter's name, unused unless `adapted`."""
        value = self._labels(label) if adapted else BASE
        series = self._series.get(value)
        if series is None:
            series = self._series[value] = AdapterSeries(self._families, value)
        return RequestMetrics(series, prompt_tokens, now)

    def drafting(self, drafting: Drafting) -> None:
        """Count an admitted request that uses speculative decoding."""
        self._speculation.request(drafting)

    def refused(self, reason: Refusal) -> None:
        self._refused.labels(reason).inc()

    def resubmitted(self) -> None:
        self._resubmitted.inc()

    def resumed(self, reason: Interruption, pause_seconds: float) -> None:
        """Count a stream at its first token from another replica."""
        self._streams.resumed(reason, pause_seconds)

    def step(self, stats: StepStats, name_of: NameOf) -> None:
        """Record one engine step. `name_of` maps the digests of drafters to adapter names."""
        self._step_seconds.observe(stats.seconds)
        self._rows.observe(stats.rows)
        self._sequences.observe(stats.sequences)
        self._distinct.observe(stats.adapters)
        self._prefill_rows.inc(stats.prefill_rows)
        self._totals.state(stats)
        if stats.mask_seconds is not None:
            self.structured.masked(stats.mask_seconds)
        self._speculation.step(stats, name_of)

    def state(self, stats: StepStats) -> None:
        """Record the engine's state between steps."""
        self._totals.state(stats)

    def engine_started(self, ready: Ready) -> None:
        self._up.set(1)
        self._totals.engine_started(ready)
        self._start_seconds.set(ready.load_seconds)

    def engine_died(self) -> None:
        self._up.set(0)
        self._restarts.inc()
        self._totals.engine_died()

    def trial_died(self) -> None:
        self._restarts.inc()

    def adapter_moved(self, event: AdapterMoved, before: Tier | None) -> None:
        """Count a load or an eviction. `before`: the version's tier before it, if known."""
        if event.reason == "load":
            self._loads.labels(event.tier).inc()
            self._load_bytes.labels(event.tier).inc(event.bytes)
            self._load_seconds.labels(event.tier).observe(event.seconds)
        elif event.reason == "evict":
            above: Tier = "device" if event.tier == "host" else "host"
            self._evictions.labels(before or above).inc()

    def adapter_failed(self) -> None:
        self._load_failures.inc()

    def render(self, name_of: NameOf | None = None) -> tuple[bytes, str]:
        """The metrics as text, and its content type.

        `name_of`: adapters' names by digest; default: those that requests came with.
        """
        body = generate_latest(self.registry)
        if (state := self._state) is not None:
            label_of = self._label_of(name_of or state.residency.label)
            families = resident({None: state.residency.snapshot()}, label_of)
            body += generate_latest(Told(families, self._for_gateways([state.report()])))
        return body, CONTENT_TYPE_LATEST

    async def render_all(self, cluster: Cluster, name_of: NameOf) -> tuple[bytes, str]:
        """The same of all replicas of a cluster, made on a thread."""
        more = self._for_gateways(cluster.view().replicas)
        body = await asyncio.to_thread(
            exposition_of_all, self.registry, cluster, self._label_of(name_of), more
        )
        return body, CONTENT_TYPE_LATEST

    def load(self, cluster: Cluster | None) -> EngineLoad:
        """The present load of this machine's engine, or of all that `cluster` has."""
        if cluster is not None:
            replicas: Iterable[ReplicaReport] = cluster.view().replicas
        else:
            replicas = () if self._state is None else [self._state.report()]
        return EngineLoad.of([report for report in replicas if report.serves])

    def _label_of(self, name_of: NameOf) -> LabelOf:
        def label_of(digest: str) -> str:
            name = name_of(digest)
            return OTHER if name is None else self._labels(name)

        return label_of

    def _for_gateways(self, replicas: Iterable[ReplicaReport]) -> Iterable[Metric]:
        return vllm_families(replicas, self._settings) if self._settings.vllm_metrics else ()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"quickchange_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"quickchange_{name}", text, buckets=buckets, registry=self.registry)


class _RequestFamilies:
    """The metrics of requests; by adapter, except for two histograms.

    A histogram by adapter adds some 18 lines for each label to a scrape, so the time in the queue
    and the whole duration have no adapter label (100 labels: 365 KB a scrape instead of 621).
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"quickchange_{name}", text, ["adapter", *more], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(
                f"quickchange_{name}", text, labels, buckets=buckets, registry=registry
            )

        self.requests = counter("requests_total", "Requests that ended", "outcome")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of begun requests")
        self.cached_tokens = counter(
            "prompt_cached_tokens_total", "Prompt tokens found in the prefix cache"
        )
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From admission to the first token",
            WAIT_BUCKETS,
            "adapter",
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "Time between tokens of a request; tokens that come together share it evenly",
            STEP_BUCKETS,
            "adapter",
        )
        self.request_seconds = histogram(
            "request_duration_seconds", "From admission to the end", REQUEST_BUCKETS
        )
        self.queue = histogram(
            "queue_time_seconds", "From arrival in the engine to the first step", WAIT_BUCKETS
        )


class AdapterSeries:
    """The series of one adapter label, cached."""

    def __init__(self, families: _RequestFamilies, label: str) -> None:
        self.prompt_tokens = families.prompt_tokens.labels(label)
        self.cached_tokens = families.cached_tokens.labels(label)
        self.generation_tokens = families.generation_tokens.labels(label)
        self.first_token = families.first_token.labels(label)
        self.inter_token = families.inter_token.labels(label)
        self.request_seconds = families.request_seconds
        self.queue = families.queue
        self.ended: Callable[[Outcome], Counter] = lambda outcome: families.requests.labels(
            label, outcome
        )


class RequestMetrics:
    """Counts one request as its deltas come. Times are monotonic seconds."""

    __slots__ = ("_admitted", "_last_token", "_prompt_tokens", "_series", "started")

    def __init__(self, series: AdapterSeries, prompt_tokens: int, now: float) -> None:
        self._series = series
        self._prompt_tokens = prompt_tokens
        self._admitted = now
        self._last_token: float | None = None
        self.started = False  # True once a delta has arrived

    def delta(self, delta: Delta, now: float) -> None:
        if not self.started:
            self.started = True
            self._series.prompt_tokens.inc(self._prompt_tokens)
        if delta.cached_tokens:
            self._series.cached_tokens.inc(delta.cached_tokens)
        if delta.queue_seconds is not None:
            self._series.queue.observe(delta.queue_seconds)
        if delta.token_ids:
            self._tokens(len(delta.token_ids), now)

    def end(self, outcome: Outcome, now: float) -> None:
        self._series.ended(outcome).inc()
        self._series.request_seconds.observe(now - self._admitted)

    def _tokens(self, count: int, now: float) -> None:
        self._series.generation_tokens.inc(count)
        if self._last_token is None:
            self._series.first_token.observe(now - self._admitted)
        else:
            gap = (now - self._last_token) / count
            for _ in range(count):
                self._series.inter_token.observe(gap)
        self._last_token = now
