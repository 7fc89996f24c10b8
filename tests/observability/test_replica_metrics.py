"""One exposition of many replicas: every series labelled, each thing counted once."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter as Tally
from collections.abc import Iterator

import pytest
from cluster_support import READY, Replica
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from quickchange_server.observability import replica_metrics
from quickchange_server.observability.replica_metrics import (
    Kind,
    OwnSnapshot,
    exposition,
    merged,
    snapshot,
    told_by,
)


def replica(requests: int = 1) -> CollectorRegistry:
    """A registry as each replica has one, whatever its kind."""
    made = Replica("unused")
    made.work(requests)
    made.metrics.resubmitted()
    return made.metrics.registry


def families(text: bytes) -> list[Metric]:
    return list(text_string_to_metric_families(text.decode()))


def samples(text: bytes, name: str) -> Iterator[Sample]:
    for family in families(text):
        yield from (sample for sample in family.samples if sample.name == name)


def total(text: bytes, name: str) -> float:
    return sum(sample.value for sample in samples(text, name))


def of(name: str, kind: Kind, requests: int = 1) -> bytes:
    return snapshot(replica(requests), name, kind)


CLUSTER = merged(
    exposition(replica(2), "ingress-1", "ingress"),
    [of("ingress-2", "ingress", 3), of("engine-1", "engine", 4), of("engine-2", "engine", 1)],
)


def test_every_series_has_the_label_of_its_replica() -> None:
    labels = Tally(s.labels.get("replica") for f in families(CLUSTER) for s in f.samples)
    assert set(labels) == {"ingress-1", "ingress-2", "engine-1", "engine-2"}


def test_a_family_is_headed_once_and_no_series_comes_twice() -> None:
    heads = re.findall(rb"^# (?:HELP|TYPE) \S+", CLUSTER, re.MULTILINE)
    series = re.findall(rb"^[^#\n].*(?= \S+$)", CLUSTER, re.MULTILINE)
    assert len(set(heads)) == len(heads) > 60
    assert len(set(series)) == len(series) > 400


def test_a_request_that_passes_an_ingress_and_an_engine_is_counted_once() -> None:
    assert total(CLUSTER, "quickchange_requests_total") == 5
    assert total(CLUSTER, "quickchange_generation_tokens_total") == 5
    assert total(CLUSTER, "quickchange_time_to_first_token_seconds_count") == 5
    replicas = {s.labels["replica"] for s in samples(CLUSTER, "quickchange_requests_total")}
    assert replicas == {"ingress-1", "ingress-2"}


def test_what_an_engine_does_is_told_by_engines_alone() -> None:
    assert total(CLUSTER, "quickchange_kv_capacity_blocks") == 2 * READY.kv_blocks
    assert total(CLUSTER, "quickchange_engine_up") == 2
    assert total(CLUSTER, "quickchange_queue_time_seconds_count") == 5  # by replica 4 and 1
    assert total(CLUSTER, "quickchange_step_duration_seconds_count") == 5


def test_every_sample_of_a_server_is_told_once_whichever_replicas_share_its_work() -> None:
    registry = replica(3)
    text = merged(exposition(registry, "i", "ingress"), [snapshot(registry, "e", "engine")])
    told: dict[tuple[str, str], list[float]] = {}
    for family in families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "replica"}
            told.setdefault((sample.name, str(sorted(labels.items()))), []).append(sample.value)
    for family in registry.collect():
        for sample in family.samples:
            values = told.get((sample.name, str(sorted(sample.labels.items()))), [])
            assert len(values) == len(told_by(family.name)), sample
            if family.name.startswith("quickchange_api_process_"):
                continue  # it has gone on
            assert set(values) <= {sample.value}, sample


def test_what_happens_on_either_side_is_told_by_both() -> None:
    assert total(CLUSTER, "quickchange_requests_resubmitted_total") == 4
    processes = samples(CLUSTER, "quickchange_api_process_open_fds")
    assert len([sample.value for sample in processes]) == 4


def test_a_histogram_keeps_all_buckets_of_each_replica_in_order() -> None:
    name = "quickchange_time_to_first_token_seconds"
    for wanted, count in (("ingress-1", 2), ("ingress-2", 3)):
        buckets = [s for s in samples(CLUSTER, f"{name}_bucket") if s.labels["replica"] == wanted]
        bounds = [float(bucket.labels["le"]) for bucket in buckets]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")
        assert buckets[-1].value == count
        (told,) = (s for s in samples(CLUSTER, f"{name}_sum") if s.labels["replica"] == wanted)
        assert told.value == count * 1.0


def test_every_family_of_a_server_is_told_by_the_kind_that_counts_it_truly() -> None:
    """A new family must be judged: is it what clients see, what an engine does, or either's own?"""
    kinds = {family.name: told_by(family.name) for family in replica().collect()}
    both = {name for name, kind in kinds.items() if len(kind) == 2}
    assert both == {
        "quickchange_requests_rejected",
        "quickchange_requests_resubmitted",
        *(name for name in kinds if name.startswith("quickchange_api_process_")),
    }
    assert {name for name, kind in kinds.items() if kind == ("ingress",)} == {
        f"quickchange_{name}"
        for name in (
            "requests",
            "prompt_tokens",
            "prompt_cached_tokens",
            "generation_tokens",
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_duration_seconds",
            "http_responses",
            "speculation_requests",
            "structured_requests",
            "structured_compile_seconds",
        )
    }


@pytest.mark.parametrize(
    "name", ["storage_queue", "tenant_requests", "experiment_share", "http_responses"]
)
def test_books_are_kept_at_ingresses(name: str) -> None:
    assert told_by(f"quickchange_{name}") == ("ingress",)


def test_a_replica_that_has_not_told_any_metrics_yet_has_no_series() -> None:
    own = exposition(replica(), "ingress-1", "ingress")
    assert merged(own, [b""]) == own


def test_a_later_release_with_another_help_shares_the_first_ones_heading() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Counter("made", "Things made", registry=first).inc()
    Counter("made", "Things that were made", registry=second).inc()
    text = merged(exposition(first, "a", "ingress"), [snapshot(second, "b", "ingress")])
    assert text.count(b"# HELP made_total ") == 1
    assert {s.labels["replica"] for s in samples(text, "made_total")} == {"a", "b"}


def test_a_later_release_with_another_type_is_left_out_of_that_family() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Gauge("depth", "How deep", registry=first).set(1)
    Histogram("depth", "How deep", buckets=(1.0,), registry=second).observe(1)
    Gauge("other", "Another", registry=second).set(1)
    text = merged(exposition(first, "a", "ingress"), [snapshot(second, "b", "ingress")])
    assert [(s.labels["replica"], s.value) for s in samples(text, "depth")] == [("a", 1.0)]
    assert not list(samples(text, "depth_count"))
    assert total(text, "other") == 1


@settings(deadline=None)
@given(
    values=st.lists(st.text(max_size=20), min_size=1, max_size=4, unique=True),
    help_text=st.text(max_size=30),
)
def test_any_help_and_label_value_comes_through(values: list[str], help_text: str) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("made", help_text, ["name"], registry=registry)
    for number, value in enumerate(values):
        gauge.labels(value).set(number)
    names = ["a", "b", "c"]
    own, *others = (snapshot(registry, name, "engine") for name in names)
    text = merged(merged(b"", [own]), others)
    told = [(s.labels["replica"], s.labels["name"], s.value) for s in samples(text, "made")]
    lone = [
        (s.labels["name"], s.value)
        for s in samples(exposition(registry, "a", "engine"), "made")  # as its library tells it
    ]
    assert told == [(name, *each) for name in names for each in lone]


def test_ten_replicas_are_merged_in_the_time_of_a_few_steps() -> None:
    """Some 16 ms for 1.8 MB; the bound is for a machine that does other things too."""
    one = Replica("unused")
    for number in range(100):
        one.work(adapter=f"adapter-{number}")
    kinds: list[Kind] = ["engine"] * 8 + ["ingress"] * 2
    others = [snapshot(one.metrics.registry, f"r{n}", kind) for n, kind in enumerate(kinds)]
    own = exposition(one.metrics.registry, "own", "ingress")
    began = time.process_time()
    merged(own, others)
    assert time.process_time() - began < 0.3


def test_a_snapshot_for_reports_is_made_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    counter = Counter("made", "Things made", registry=registry)

    async def three() -> list[float]:
        own, seen = OwnSnapshot(registry, "a", "engine"), []
        for seconds in (3.0, 3.0, 0.0):
            monkeypatch.setattr(replica_metrics, "RENEW_SECONDS", seconds)
            counter.inc()
            seen.append(total(merged(b"", [await own.latest()]), "made_total"))
        return seen

    assert asyncio.run(three()) == [1, 1, 3]
