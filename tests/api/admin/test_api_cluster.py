"""What an ingress tells of its cluster, and that a single machine tells none of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster_support import FakeCluster, Replica
from http_support import BASE, Live, live_server, make_adapter, make_turbo
from keys_support import bearer, make_key
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.in_flight_request import DeltaStream
from quickchange_server.protocol import Submit
from quickchange_store.store import Store


@pytest.fixture(scope="module")
def cluster() -> FakeCluster:
    first, second = Replica("engine-b"), Replica("engine-a")
    first.work(3)
    second.work(2)
    starting = Replica("engine-c", state="starting")
    return FakeCluster(first, second, starting, Replica("ingress-2", "ingress"), wanted=3)


@pytest.fixture(scope="module")
def live(cluster: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """An ingress; its engine is one of this machine, which no route here asks about."""
    folder = tmp_path_factory.mktemp("cluster")
    version = Store(folder).add("orders", make_adapter(1.0))
    cluster.replicas[0].hold(version.digest, "orders", 700)
    with live_server(folder, cluster=cluster.seen) as live:
        yield live


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("alone")) as live:
        yield live


def replicas_in(text: str, name: str) -> dict[str, float]:
    """The values of a metric by replica."""
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_an_ingress_lives_while_no_engine_does(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineClient, "state", property(lambda _: "failed"))
    assert live.http.get("/health/live").status_code == 200
    assert live.http.get("/health/ready").status_code == 503


def test_the_cluster_is_told_replica_by_replica(live: Live) -> None:
    told = live.http.get("/v1/cluster").json()
    assert told["object"] == "cluster"
    assert told["answered_by"] == "ingress-1"
    assert told["engines"] == {"ready": 2, "wanted": 3}
    assert told["pins"] == ["d"]
    ids = [replica["id"] for replica in told["data"]]
    assert ids == ["engine-a", "engine-b", "engine-c", "ingress-2"]
    assert told["data"][1] == {
        "id": "engine-b",
        "object": "replica",
        "kind": "engine",
        "node": "node-1",
        "state": "ready",
        "reported": 1_800_000_000.0,
        "engine": {
            "running": 8,
            "waiting": 2,
            "kv_share": 0.3125,
            "step_seconds": 0.02,
            "device": {"adapters": 1, "used_bytes": 700, "capacity_bytes": 10_000},
            "host": {"adapters": 0, "used_bytes": 0, "capacity_bytes": 20_000},
        },
    }
    assert told["data"][3]["engine"] is None


def test_a_single_machine_has_no_cluster_and_says_so(alone: Live) -> None:
    answer = alone.http.get("/v1/cluster")
    assert answer.status_code == 404
    assert "single machine" in answer.json()["error"]["message"]


def test_the_cluster_is_shown_to_administrators_alone(tmp_path: Path, cluster: FakeCluster) -> None:
    _, admin = make_key(tmp_path, "operator", "admin")
    _, manager = make_key(tmp_path, "acme", "manage")
    with live_server(tmp_path, cluster=cluster.seen, api_keys=True) as live:
        path = "/v1/cluster"
        assert live.http.get(path).status_code == 401
        assert live.http.get(path, headers=bearer(manager)).status_code == 403
        assert live.http.get(path, headers=bearer(admin)).status_code == 200


def test_health_counts_the_engine_replicas(live: Live) -> None:
    told = live.http.get("/health").json()
    assert told == {"state": "ready", "replicas": {"ready": 2, "wanted": 3}}


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/ping"])
def test_health_of_a_single_machine_has_the_state_alone(alone: Live, path: str) -> None:
    assert alone.http.get(path).json() == {"state": "ready"}


def test_an_adapter_is_told_with_its_tier_on_each_replica_that_has_it(live: Live) -> None:
    residency = live.http.get("/v1/adapters").json()["data"][0]["residency"]
    assert residency["replicas"] == {"engine-b": "device"}
    one = live.http.get("/v1/adapters/orders").json()
    assert one["residency"]["replicas"] == {"engine-b": "device"}
    assert one["versions"][0]["residency"]["replicas"] == {"engine-b": "device"}


def test_an_adapter_of_a_single_machine_is_told_without_replicas(alone: Live) -> None:
    alone.store.add("orders", make_adapter(1.0))
    told: dict[str, Any] = alone.http.get("/v1/adapters/orders").json()
    assert told["residency"] == {"tier": "disk", "bytes": 0, "pinned": False}


def test_metrics_are_those_of_all_replicas(live: Live) -> None:
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert replicas_in(answer.text, "quickchange_queue_time_seconds_count") == {
        "engine-a": 2,
        "engine-b": 3,
        "engine-c": 0,
    }
    names = {"engine-a", "engine-b", "engine-c", "ingress-1", "ingress-2"}
    assert replicas_in(answer.text, "quickchange_api_process_open_fds").keys() == names


def test_a_scrape_has_the_ingress_own_requests_as_they_are(live: Live) -> None:
    name = "quickchange_generation_tokens_total"
    before = replicas_in(live.http.get("/metrics").text, name).get("ingress-1", 0)
    live.post("/v1/completions", {"model": "orders", "prompt": "abc", "max_tokens": 5})
    assert replicas_in(live.http.get("/metrics").text, name)["ingress-1"] == before + 5


def test_replicas_that_are_gone_have_no_series(live: Live, cluster: FakeCluster) -> None:
    gone = cluster.replicas.pop(0)
    try:
        assert gone.name not in live.http.get("/metrics").text
    finally:
        cluster.replicas.insert(0, gone)


def test_a_report_of_the_ingress_itself_adds_no_second_series(
    live: Live, cluster: FakeCluster
) -> None:
    own = Replica("ingress-1", "ingress")
    own.work(1000)
    cluster.replicas.append(own)
    try:
        told = replicas_in(live.http.get("/metrics").text, "quickchange_requests_total")
        assert told["ingress-1"] < 1000
    finally:
        cluster.replicas.remove(own)


def test_routing_and_replicas_are_counted(live: Live) -> None:
    lines = live.http.get("/metrics").text.splitlines()
    for line in (
        'quickchange_routing_total{replica="ingress-1",result="device"} 80.0',
        'quickchange_routing_total{replica="ingress-1",result="loading"} 10.0',
        'quickchange_routing_total{replica="ingress-1",result="host"} 6.0',
        'quickchange_routing_total{replica="ingress-1",result="cold"} 4.0',
        'quickchange_ingress_requests{replica="ingress-1"} 0.0',
        'quickchange_cluster_replicas{kind="engine",state="ready"} 2.0',
        'quickchange_cluster_replicas{kind="engine",state="starting"} 1.0',
        'quickchange_cluster_replicas{kind="ingress",state="ready"} 1.0',
        "quickchange_cluster_engines_wanted 3.0",
    ):
        assert line in lines


def test_what_is_resident_has_the_stores_names_for_it(live: Live, cluster: FakeCluster) -> None:
    """Engine replicas know digests alone."""
    cluster.replicas[1].hold("unknown", "a name that no ingress knows", 30)
    lines = live.http.get("/metrics").text.splitlines()
    name = "quickchange_adapter_resident_bytes"
    told = [line for line in lines if line.startswith(f"{name}{{")]
    assert sorted(told) == [
        f'{name}{{adapter="orders",replica="engine-b",tier="device"}} 700.0',
        f'{name}{{adapter="other",replica="engine-a",tier="device"}} 30.0',
    ]
    assert lines.count(f"# TYPE {name} gauge") == 1


def test_a_damaged_store_does_not_take_the_metrics_away(tmp_path: Path) -> None:
    with live_server(tmp_path, cluster=FakeCluster(Replica("engine-a")).seen) as live:
        live.store.add("orders", make_adapter(1.0))
        for index in tmp_path.rglob("index*.json"):
            index.write_text("{")
        assert live.http.get("/v1/adapters").status_code == 500
        answer = live.http.get("/metrics")
        assert answer.status_code == 200
        assert 'replica="engine-a"' in answer.text


def test_a_stream_that_changed_its_replica_is_counted_with_its_pause(live: Live) -> None:
    live.services.metrics.resumed("lost", 0.3)
    live.services.metrics.resumed("drained", 0.02)
    text = live.http.get("/metrics").text
    lines = text.splitlines()
    name = "quickchange_stream_resumes_total"
    assert f'{name}{{reason="lost",replica="ingress-1"}} 1.0' in lines
    assert f'{name}{{reason="drained",replica="ingress-1"}} 1.0' in lines
    assert replicas_in(text, "quickchange_stream_pause_seconds_sum") == {"ingress-1": 0.32}


@pytest.mark.parametrize("part", ["replica", "_routing_", "_stream_", "_ingress_", "_cluster_"])
def test_metrics_of_a_single_machine_have_nothing_of_clusters(alone: Live, part: str) -> None:
    assert part not in alone.http.get("/metrics").text


def test_what_goes_to_engine_replicas_has_the_names_of_its_adapters(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Submit] = []
    generate = live.services.client.generate

    def noting(submits: Sequence[Submit], **names: Any) -> DeltaStream:
        sent.extend(submits)
        return generate(submits, **names)

    monkeypatch.setattr(live.services.client, "generate", noting)
    live.store.add("fast", make_turbo(9.0, lora=True))
    for model in ("orders", "fast", BASE):
        live.post("/v1/completions", {"model": model, "prompt": "abc", "max_tokens": 1})
    assert [(s.label, s.drafter) for s in sent] == [
        ("orders", None),
        ("fast", "fast"),
        ("base", None),
    ]
