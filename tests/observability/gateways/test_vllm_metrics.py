"""vLLM's gauges as gateways read them: the reader here does what their extractors document."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cluster_support import READY, FakeCluster, Replica
from fake_engine import ADAPTER_BYTES, Behaviour
from http_support import BASE, Live, live_server, make_adapter, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.observability.gateways.vllm_metrics import vllm_families
from quickchange_server.observability.metrics import Metrics
from quickchange_store.store import Store

QUEUED, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
KV_USAGE, OLD_KV_USAGE = "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"
LORA, CACHE = "vllm:lora_requests_info", "vllm:cache_config_info"


@dataclass
class Endpoint:
    """A pod's state as an endpoint picker keeps it."""

    waiting: int
    running: int
    kv_usage: float
    active: set[str]
    queued: set[str]
    most: int
    block_size: int
    blocks: int


def scraped(families: Iterable[Metric], kv_usage: str = KV_USAGE) -> Endpoint:
    """What the extractor of llm-d and of the inference extension makes of a scrape.

    Gauges: the first series. Adapters: the series whose value is the largest, its lists split at
    commas. Numbers in labels are read as whole ones, an empty list adds nothing.
    """
    by_name = {family.name: family for family in families}

    def first(name: str) -> float:
        return float(by_name[name].samples[0].value)

    def listed(value: str) -> set[str]:
        return {name.strip() for name in value.split(",")} - {""}

    newest = max(by_name[LORA].samples, key=lambda sample: sample.value)
    cache = by_name[CACHE].samples[0].labels
    assert all(by_name[name].type == "gauge" for name in (QUEUED, RUNNING, kv_usage, LORA, CACHE))
    return Endpoint(
        waiting=int(first(QUEUED)),
        running=int(first(RUNNING)),
        kv_usage=first(kv_usage),
        active=listed(newest.labels["running_lora_adapters"]),
        queued=listed(newest.labels["waiting_lora_adapters"]),
        most=int(newest.labels["max_lora"]),
        block_size=int(cache["block_size"]),
        blocks=int(cache["num_gpu_blocks"]),
    )


def asked(live: Live, kv_usage: str = KV_USAGE) -> Endpoint:
    return scraped(text_string_to_metric_families(live.http.get("/metrics").text), kv_usage)


def settings_of(**changes: object) -> Settings:
    given = {"model": "org/base", "store": Path("store"), "vllm_metrics": True, **changes}
    return Settings(**given)  # type: ignore[arg-type]


def report(**changes: object) -> ReplicaReport:
    return replace(Replica("engine-1").report(), **changes)  # type: ignore[arg-type]


def test_a_server_tells_its_adapters_in_flight_and_its_cache(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, name in enumerate(("orders", "tickets")):
        store.add(name, make_adapter(1.0 + number))
    slow = Behaviour(step_seconds=0.02)
    with live_server(tmp_path, slow, vllm_metrics=True, block_size=32) as live:
        before = asked(live)
        assert (before.waiting, before.running, before.active) == (0, 0, set())
        body = {"model": "orders", "prompt": "abc", "max_tokens": 2000, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # closed, it would close the stream
            next(lines)
            busy = asked(live)
            assert (busy.running, busy.waiting) == (1, 0)
            assert (busy.active, busy.queued) == ({"orders"}, set())
            assert (busy.block_size, busy.blocks) == (32, 128)
            assert busy.kv_usage == asked(live, OLD_KV_USAGE).kv_usage == 1 / 128
            assert busy.most == live.services.settings.step_sequences
        wait_until(lambda: asked(live).active == set())


def test_the_series_carry_vllms_labels_and_the_time(tmp_path: Path) -> None:
    with live_server(tmp_path, vllm_metrics=True) as live:
        text = live.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families[RUNNING].samples[0].labels == {"model_name": BASE, "engine": "0"}
    (info,) = families[LORA].samples
    assert info.labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert abs(info.value - time.time()) < 600


def test_without_the_setting_no_series_has_vllms_names(tmp_path: Path) -> None:
    with live_server(tmp_path) as live:
        assert "vllm:" not in live.http.get("/metrics").text


def test_while_there_is_no_engine_all_requests_wait() -> None:
    metrics = Metrics(settings_of())
    metrics.watch(Replica("unused"))
    told = scraped(text_string_to_metric_families(metrics.render()[0].decode()))
    assert (told.running, told.waiting, told.active) == (0, 10, set())
    assert told.queued == {"orders", "tickets"}


def test_a_cluster_is_told_as_one_server() -> None:
    engines = [
        report(running=3, waiting=1, kv_share=0.5, running_adapters={"a"}, waiting_adapters={"b"}),
        report(
            running=1, waiting=2, kv_share=0.25, running_adapters={"b", "+"}, waiting_adapters=()
        ),
        report(running=9, state="draining"),
        Replica("ingress-1", "ingress").report(),
    ]
    told = scraped(vllm_families(engines, settings_of(max_sequences=8)))
    assert (told.running, told.waiting) == (4, 3)
    assert told.kv_usage == 0.375
    assert told.blocks == 2 * READY.kv_blocks
    assert (told.active, told.queued) == ({"a", "b"}, set())
    assert told.most == 16


def test_an_ingress_tells_each_family_once_and_without_a_replica() -> None:
    cluster = FakeCluster(Replica("engine-1"), Replica("engine-2"))
    metrics = Metrics(settings_of())
    text = asyncio.run(metrics.render_all(cluster.seen, {}.get))[0].decode()
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")]
    assert len(families) == len({family.name for family in families}) == 6
    for family in families:
        (sample,) = family.samples
        assert "replica" not in sample.labels
    assert scraped(families).running == 16


@pytest.mark.parametrize(
    ("sizes", "adapters", "most"),
    [
        ((), True, 8),  # nothing is known of their size
        ((1000,), True, 8),
        ((1000, 2500), True, 4),  # of 10000 bytes
        ((99_999,), True, 0),
        ((), False, 0),
    ],
)
def test_as_many_adapters_as_sequences_and_device_bytes_allow(
    sizes: tuple[int, ...], adapters: bool, most: int
) -> None:
    residency = {str(n): Residence("device", size, False) for n, size in enumerate(sizes)}
    chosen = settings_of(max_sequences=8, adapters=adapters)
    assert scraped(vllm_families([report(residency=residency)], chosen)).most == most


NAMES = st.sets(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,20}", fullmatch=True), max_size=5)


@settings(deadline=None)
@given(running=NAMES, waiting=NAMES)
def test_any_names_come_through_the_lists_and_none_is_in_both(
    running: set[str], waiting: set[str]
) -> None:
    told = scraped(
        vllm_families([report(running_adapters=running, waiting_adapters=waiting)], settings_of())
    )
    assert (told.active, told.queued) == (running, waiting - running)


def test_adapter_bytes_of_the_engine_bound_the_number_once_one_is_loaded(tmp_path: Path) -> None:
    Store(tmp_path).add("orders", make_adapter(1.0))
    with live_server(
        tmp_path, vllm_metrics=True, adapter_device_bytes=3 * ADAPTER_BYTES + 100
    ) as live:
        live.post("/v1/completions", {"model": "orders", "prompt": "a", "max_tokens": 1})
        assert asked(live).most == 3


def test_the_document_lists_every_series_with_its_labels() -> None:
    text = (Path(__file__).parents[3] / "docs" / "gateways.md").read_text()
    rows = re.findall(r"^\| `(vllm:\w+)` \| (.+?) \|", text, re.MULTILINE)
    told = {f.name: set(f.samples[0].labels) for f in vllm_families([report()], settings_of())}
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == told
