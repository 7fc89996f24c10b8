"""Metrics of the engine's state and totals, collected at each scrape.

Each engine's totals start at zero; those of earlier engines are added, so that the counters never
decrease.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.engine_client.client_observer import ServerState
from quickchange_server.engine_client.remote.cluster_view import READY, ReplicaReport
from quickchange_server.protocol import Ready, StepStats

_TOTALS = {
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Sequences that gave up their KV blocks to be computed again",
    "late_compilations": "Kernels compiled while requests waited, which the start should have done",
    "late_captures": "Graphs captured while requests waited, which the start should have done",
}


class EngineTotals:
    """The running engine's limits and latest state, and the totals of earlier engines."""

    def __init__(self) -> None:
        self.ready: Ready | None = None  # None: no engine runs
        self.last: StepStats | None = None
        self._earlier = dict.fromkeys(_TOTALS, 0)

    def engine_started(self, ready: Ready) -> None:
        self.ready = ready

    def state(self, stats: StepStats) -> None:
        self.last = stats

    def engine_died(self) -> None:
        self._earlier = self.totals()
        self.ready = self.last = None

    def totals(self) -> dict[str, int]:
        last = self.last
        if last is None:
            return dict(self._earlier)
        return {name: count + getattr(last, name) for name, count in self._earlier.items()}


class StateCollector(Collector):
    """Prometheus collector of the client's state and the engine's totals."""

    def __init__(self, state: ServerState, totals: EngineTotals) -> None:
        self._state = state
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._kv_cache()
        yield from self._engine_totals()
        yield from self._tiers()

    @property
    def residency(self) -> AdapterStatus:
        return self._state.residency

    def report(self) -> ReplicaReport:
        """The same as a cluster's replica would report it; without an engine, all requests wait."""
        info, last = self._totals.ready, self._totals.last
        running, waiting = self._running_and_waiting()
        begun, others = self._state.adapters_in_flight()
        return ReplicaReport(
            "",
            "engine",
            "",
            READY,
            info=info,
            residency=self.residency.snapshot(),
            running=running,
            waiting=waiting,
            running_adapters=begun if info else (),
            waiting_adapters=others if info else begun | others,
            kv_share=last.kv_blocks_used / info.kv_blocks if last and info else 0.0,
        )

    def _running_and_waiting(self) -> tuple[int, int]:
        """Running as the engine last said; all others wait, also those that wait for an engine."""
        in_flight = self._state.in_flight
        last = self._totals.last
        running = 0 if last is None else min(last.running, in_flight)
        return running, in_flight - running

    def _requests(self) -> Iterator[Metric]:
        running, waiting = self._running_and_waiting()
        yield _gauge("requests_running", "Requests in the engine's batch", running)
        yield _gauge("requests_waiting", "Requests admitted and not running", waiting)

    def _kv_cache(self) -> Iterator[Metric]:
        info, last = self._totals.ready, self._totals.last
        capacity = 0 if info is None else info.kv_blocks
        used = 0 if last is None else last.kv_blocks_used
        cached = 0 if last is None else last.kv_blocks_cached
        yield _gauge("kv_capacity_blocks", "KV blocks in all", capacity)
        yield _gauge("kv_used_blocks", "KV blocks that sequences use", used)
        yield _gauge("kv_cached_blocks", "KV blocks kept for prefix hits alone", cached)

    def _engine_totals(self) -> Iterator[Metric]:
        for name, count in self._totals.totals().items():
            yield CounterMetricFamily(f"quickchange_{name}", _TOTALS[name], value=count)

    def _tiers(self) -> Iterator[Metric]:
        count: defaultdict[str, int] = defaultdict(int)
        size: defaultdict[str, int] = defaultdict(int)
        for residence in self._state.residency.snapshot().values():
            count[residence.tier] += 1
            size[residence.tier] += residence.bytes
        info = self._totals.ready
        capacity = {
            "device": info.adapter_device_bytes if info else 0,
            "host": info.adapter_host_bytes if info else 0,
        }
        yield _by_tier("tier_adapters", "Adapter versions on a tier", count)
        yield _by_tier("tier_used_bytes", "Bytes of adapter versions on a tier", size)
        yield _by_tier("tier_capacity_bytes", "Budget of a tier in bytes", capacity)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"quickchange_{name}", text, value=value)


def _by_tier(name: str, text: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"quickchange_{name}", text, labels=["tier"])
    for tier in ("device", "host"):
        family.add_metric([tier], values.get(tier, 0))
    return family
