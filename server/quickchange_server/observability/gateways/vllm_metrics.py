"""vLLM's gauges that the Gateway API inference extension, llm-d and their like scrape.

A gateway takes an address for one server, so they are told once, for all engines behind it, and
without a replica's label: it reads one series of a family and no other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric

from quickchange_server.config import Settings
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.observability.naming.labels import COMPOSED
from quickchange_store.base_model.base_source import base_name

ENGINE = {"engine": "0"}  # vLLM's label for one of several engines behind an address


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of all engines that take requests, at one moment."""

    running: int
    waiting: int
    kv_blocks: int
    kv_share: float  # of the blocks that are in use

    @classmethod
    def of(cls, engines: Sequence[ReplicaReport]) -> EngineLoad:
        sizes = [(report.kv_share, report.info.kv_blocks) for report in engines if report.info]
        blocks = sum(count for _, count in sizes)
        used = sum(share * count for share, count in sizes)
        running, waiting = sum(r.running for r in engines), sum(r.waiting for r in engines)
        return cls(running, waiting, blocks, used / blocks if blocks else 0.0)


def vllm_families(replicas: Iterable[ReplicaReport], settings: Settings) -> Iterator[Metric]:
    """The load of all engines that take requests, at this moment."""
    engines = [report for report in replicas if report.serves]
    load = EngineLoad.of(engines)
    model = {"model_name": (settings.served_names or (base_name(settings.model),))[0]} | ENGINE
    yield _gauge("num_requests_running", "Requests in the batch", load.running, model)
    yield _gauge("num_requests_waiting", "Requests that wait for it", load.waiting, model)
    share = load.kv_share
    yield _gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all", share, model)
    yield _gauge("gpu_cache_usage_perc", "kv_cache_usage_perc by its old name", share, model)
    sizes = [report.info.block_size for report in engines if report.info]
    cache = {
        "block_size": str(sizes[0] if sizes else settings.block_size),
        "num_gpu_blocks": str(load.kv_blocks),
        "enable_prefix_caching": str(settings.prefix_cache),
    }
    yield _gauge("cache_config_info", "The KV cache's configuration", 1, cache | ENGINE)
    yield _gauge(
        "lora_requests_info",
        "Adapters of running and of waiting requests; the value is the time in seconds",
        time.time(),  # readers take the newest of several series
        _adapters(engines, settings),
    )


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _adapters(engines: Sequence[ReplicaReport], settings: Settings) -> dict[str, str]:
    """Adapters by name, joined by commas, which no name has."""
    running = {name for report in engines for name in report.running_adapters} - {COMPOSED}
    waiting = {name for report in engines for name in report.waiting_adapters} - {COMPOSED}
    return {
        "max_lora": str(sum(_most_adapters(report, settings) for report in engines)),
        "running_lora_adapters": ",".join(sorted(running)),
        "waiting_lora_adapters": ",".join(sorted(waiting - running)),
    }


def _most_adapters(report: ReplicaReport, settings: Settings) -> int:
    """Adapters that can run at once: one a sequence, and no more than the device tier holds of the
    largest that is on a tier."""
    if report.info is None or not settings.adapters:
        return 0
    largest = max((there.bytes for there in report.residency.values()), default=0)
    budget = report.info.adapter_device_bytes
    return min(settings.step_sequences, budget // largest if largest else settings.step_sequences)
