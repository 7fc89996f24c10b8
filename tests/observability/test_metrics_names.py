"""The metrics' names, bounds and arithmetic, as a Prometheus parser reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from quickchange_server.config import Settings
from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.observability.metrics import Metrics
from quickchange_server.observability.naming.labels import AdapterLabels
from quickchange_server.protocol import (
    LOOKUP,
    AdapterMoved,
    Delta,
    DraftCount,
    Drafting,
    Ready,
    StepStats,
)

READY = Ready(2048, 128, 16, 1.5, 10_000, 20_000)
STATS = StepStats(0.02, 12, 4, 8, 3, 8, 2, 40, 10, 100, 200, 1)
DRAFTS = (
    DraftCount("t", 1, drafted=4, accepted=3),
    DraftCount("t", 2, drafted=2, accepted=1),
    DraftCount(LOOKUP, 1, drafted=5, accepted=0),
)
NAMES = {"t": "turbo"}
BASE_UNITS = ("_seconds", "_bytes", "_tokens", "_rows", "_blocks")
COUNTS = (  # gauges and histograms of things without a unit, named by what they count
    "quickchange_batch_sequences",
    "quickchange_batch_adapters",
    "quickchange_requests_running",
    "quickchange_requests_waiting",
    "quickchange_tier_adapters",
    "quickchange_adapter_resident",
    "quickchange_adapter_info",
    "quickchange_engine_up",
    "_fds",
)


class State:
    """A server's state for a scrape."""

    in_flight = 10
    pid: int | None = None
    info: Ready | None = READY

    def __init__(self) -> None:
        self.residency = AdapterStatus()

    def adapters_in_flight(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"orders"}), frozenset()


def make_metrics(adapters: int = 100) -> Metrics:
    return Metrics(Settings(model="fake", store=Path("store"), metrics_adapters=adapters))


def busy_metrics() -> tuple[Metrics, State]:
    """Metrics with something in every family."""
    metrics, state = make_metrics(), State()
    metrics.watch(state)
    metrics.engine_started(READY)
    metrics.step(STATS, NAMES.get)
    metrics.step(
        STATS._replace(drafts=DRAFTS, draft_rows=11, draft_estimate=4.5, draft_gain=4), NAMES.get
    )
    metrics.drafting(Drafting("t", lookup=True))
    request = metrics.request("orders", True, 7, 0.0)
    request.delta(Delta("a", (1,), cached_tokens=3, queue_seconds=0.2), 1.0)
    request.delta(Delta("a", (2, 3)), 1.5)
    request.end("stop", 2.0)
    metrics.refused("queue_full")
    metrics.resubmitted()
    metrics.adapter_failed()
    move = AdapterMoved("d", "device", "load", 0.01, 1000)
    state.residency.name("d", "orders")
    metrics.adapter_moved(move, state.residency.moved(move))
    metrics.adapter_moved(AdapterMoved("e", "host", "evict", 0.0, 1000), "device")
    return metrics, state


def samples(metrics: Metrics) -> Iterator[Sample]:
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        yield from family.samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [s for s in samples(metrics) if s.name == name and labels.items() <= s.labels.items()]
    assert found, name
    return sum(sample.value for sample in found)


def test_every_name_has_the_prefix_a_base_unit_and_total_on_counters_alone() -> None:
    metrics, _ = busy_metrics()
    families = list(text_string_to_metric_families(metrics.render()[0].decode()))
    assert len(families) > 30
    for family in families:
        name = family.name
        assert name.startswith("quickchange_"), name
        assert family.documentation, name
        if name.endswith("_created"):
            continue  # the client library's own, for each counter and histogram
        assert not name.endswith("_total"), name  # the parser takes it off counters
        if family.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in family.samples), name
        else:
            assert name.endswith(BASE_UNITS + COUNTS), name


def test_the_content_type_is_prometheus_text() -> None:
    assert make_metrics().render()[1].startswith("text/plain; version=")


def test_a_request_is_counted_by_adapter_from_its_deltas() -> None:
    metrics, _ = busy_metrics()
    orders = {"adapter": "orders"}
    assert value(metrics, "quickchange_prompt_tokens_total", **orders) == 7
    assert value(metrics, "quickchange_prompt_cached_tokens_total", **orders) == 3
    assert value(metrics, "quickchange_generation_tokens_total", **orders) == 3
    assert value(metrics, "quickchange_time_to_first_token_seconds_sum", **orders) == 1.0
    assert value(metrics, "quickchange_inter_token_latency_seconds_count", **orders) == 2
    assert value(metrics, "quickchange_inter_token_latency_seconds_sum", **orders) == 0.5
    assert value(metrics, "quickchange_request_duration_seconds_sum") == 2.0
    assert value(metrics, "quickchange_queue_time_seconds_sum") == 0.2
    assert value(metrics, "quickchange_requests_total", outcome="stop", **orders) == 1


def test_a_step_is_seen_in_the_batch_histograms() -> None:
    metrics, _ = busy_metrics()
    assert value(metrics, "quickchange_step_duration_seconds_sum") == 0.04
    assert value(metrics, "quickchange_batch_rows_sum") == 24
    assert value(metrics, "quickchange_batch_sequences_sum") == 16
    assert value(metrics, "quickchange_batch_adapters_bucket", le="2.0") == 0
    assert value(metrics, "quickchange_batch_adapters_bucket", le="3.0") == 2
    assert value(metrics, "quickchange_prefill_rows_total") == 8


def test_drafts_are_counted_by_adapter_and_depth_and_their_price_in_all() -> None:
    metrics, _ = busy_metrics()
    speculation = "quickchange_speculation_"
    drafted, accepted = f"{speculation}drafted_tokens_total", f"{speculation}accepted_tokens_total"
    counts = {
        (label, depth): tuple(
            value(metrics, name, adapter=label, depth=depth) for name in (drafted, accepted)
        )
        for label, depth in (("turbo", "1"), ("turbo", "2"), ("lookup", "1"))
    }
    assert counts == {("turbo", "1"): (4, 3), ("turbo", "2"): (2, 1), ("lookup", "1"): (5, 0)}
    assert value(metrics, f"{speculation}rows_total") == 11
    assert value(metrics, f"{speculation}estimated_tokens_total") == 4.5
    assert value(metrics, f"{speculation}gained_tokens_total") == 4


def test_requests_are_counted_by_what_drafts_for_them() -> None:
    metrics = make_metrics()
    for drafting in (Drafting("t"), Drafting("t", lookup=True), Drafting(lookup=True)):
        metrics.drafting(drafting)
    name = "quickchange_speculation_requests_total"
    counted = {s.labels["drafter"]: s.value for s in samples(metrics) if s.name == name}
    assert counted == {"heads": 1, "heads+lookup": 1, "lookup": 1}


def test_drafts_of_adapters_without_a_known_name_are_counted_as_other() -> None:
    metrics = make_metrics(adapters=1)
    for digest in ("t", "u", "v"):
        stats = STATS._replace(drafts=(DraftCount(digest, 1, 1, 0),), draft_rows=1)
        metrics.step(stats, {"t": "turbo", "u": "beyond the bound"}.get)
    drafted = "quickchange_speculation_drafted_tokens_total"
    assert value(metrics, drafted, adapter="turbo") == 1
    assert value(metrics, drafted, adapter="other") == 2


def test_a_scrape_reads_requests_blocks_and_tiers() -> None:
    metrics, _ = busy_metrics()
    assert value(metrics, "quickchange_requests_running") == 8
    assert value(metrics, "quickchange_requests_waiting") == 2
    assert value(metrics, "quickchange_kv_used_blocks") == 40
    assert value(metrics, "quickchange_kv_capacity_blocks") == 128
    assert value(metrics, "quickchange_tier_adapters", tier="device") == 1
    assert value(metrics, "quickchange_tier_used_bytes", tier="device") == 1000
    assert value(metrics, "quickchange_tier_capacity_bytes", tier="host") == 20_000
    resident = "quickchange_adapter_resident_bytes"
    assert value(metrics, resident, adapter="orders", tier="device") == 1000


def test_the_processes_memory_is_told_apart() -> None:
    metrics, state = busy_metrics()
    names = {sample.name for sample in samples(metrics)}
    assert "quickchange_api_process_resident_memory_bytes" in names
    assert "quickchange_engine_process_resident_memory_bytes" not in names
    state.pid = 1
    assert value(metrics, "quickchange_engine_process_resident_memory_bytes") > 0


def test_an_idle_server_runs_nothing_whatever_the_last_step_said() -> None:
    metrics, state = busy_metrics()
    state.in_flight = 0
    assert value(metrics, "quickchange_requests_running") == 0
    assert value(metrics, "quickchange_requests_waiting") == 0


def test_loads_failures_and_evictions_are_counted_by_the_tier_they_concern() -> None:
    metrics, _ = busy_metrics()
    metrics.adapter_moved(AdapterMoved("f", "disk", "evict"), "device")
    metrics.adapter_moved(AdapterMoved("g", "disk", "evict"), None)
    metrics.adapter_moved(AdapterMoved("h", "disk", "forget"), "host")
    assert value(metrics, "quickchange_adapter_loads_total", tier="device") == 1
    assert value(metrics, "quickchange_adapter_load_bytes_total", tier="device") == 1000
    assert value(metrics, "quickchange_adapter_load_seconds_count", tier="device") == 1
    assert value(metrics, "quickchange_adapter_load_failures_total") == 1
    assert value(metrics, "quickchange_adapter_evictions_total", tier="device") == 2
    assert value(metrics, "quickchange_adapter_evictions_total", tier="host") == 1


def test_the_engines_totals_never_go_back_over_restarts() -> None:
    metrics, _ = busy_metrics()
    seen = []
    for hits in (100, 150):
        metrics.step(STATS._replace(prefix_hit_tokens=hits), NAMES.get)
        seen.append(value(metrics, "quickchange_prefix_hit_tokens_total"))
    metrics.engine_died()
    seen.append(value(metrics, "quickchange_prefix_hit_tokens_total"))
    metrics.engine_started(READY)
    for hits in (0, 20):
        metrics.step(STATS._replace(prefix_hit_tokens=hits), NAMES.get)
        seen.append(value(metrics, "quickchange_prefix_hit_tokens_total"))
    metrics.engine_died()
    metrics.engine_died()  # one that never made a step
    seen.append(value(metrics, "quickchange_prefix_hit_tokens_total"))
    assert seen == [100, 150, 150, 150, 170, 170]
    assert value(metrics, "quickchange_engine_restarts_total") == 3


def test_a_dead_engine_is_down_and_holds_nothing() -> None:
    metrics, _ = busy_metrics()
    assert value(metrics, "quickchange_engine_up") == 1
    metrics.engine_died()
    assert value(metrics, "quickchange_engine_up") == 0
    assert value(metrics, "quickchange_kv_used_blocks") == 0
    assert value(metrics, "quickchange_requests_waiting") == 10


def test_adapters_beyond_the_bound_share_one_label_value() -> None:
    metrics = make_metrics(adapters=2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.request(name, True, 1, 0.0).end("stop", 1.0)
    metrics.request("whatever", False, 1, 0.0).end("stop", 1.0)
    counted = {
        s.labels["adapter"]: s.value
        for s in samples(metrics)
        if s.name == "quickchange_requests_total"
    }
    assert counted == {"a": 2, "b": 1, "other": 2, "base": 1}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("orders@3f2a", "orders@3f2a"),
        ('a"b\nc\\', "a_b_c_"),
        ("é\ud800", "__"),
        ("x" * 500, "x" * 100),
        ("base", "other"),
        ("other", "other"),
        ("lookup", "other"),
    ],
)
def test_label_text_is_kept_plain_and_short(name: str, label: str) -> None:
    assert AdapterLabels(10)(name) == label


def test_residency_without_a_known_name_is_counted_as_other() -> None:
    metrics, state = busy_metrics()
    state.residency.moved(AdapterMoved("nameless", "host", "load", 0.0, 77))
    resident = "quickchange_adapter_resident_bytes"
    assert value(metrics, resident, adapter="other", tier="host") == 77


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = make_metrics(), make_metrics()
    first.refused("unavailable")
    assert value(first, "quickchange_requests_rejected_total") == 1
    assert not [s for s in samples(second) if s.name == "quickchange_requests_rejected_total"]


def test_residences_keep_pins_of_versions_that_are_on_disk() -> None:
    status = AdapterStatus()
    status.pin("d", True)
    moves: list[Any] = [
        status.moved(AdapterMoved("d", "device", "load", 0.1, 5)),
        status.moved(AdapterMoved("d", "host", "evict", 0.0, 4)),
    ]
    assert moves == [None, "device"]
    assert status["d"].pinned
    status.clear()
    assert status.pins == ("d",)
    assert dict(status) == {}
