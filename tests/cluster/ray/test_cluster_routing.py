"""Routing by adapter held against routing by chance: 64 adapters, of which an engine holds 40."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_harness import LiveCluster, wait_until
from cluster_streams import LORAS, Asked, series, tell
from random_router import RandomRequestRouter

from quickchange_server.cluster import application
from quickchange_server.config import Settings
from quickchange_server.observability.cluster_metrics import RESULTS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

HELD = 40
REQUESTS = 600
CLIENTS = 8


@pytest.fixture
def small(cluster: LiveCluster, store: Path) -> Iterator[Settings]:
    """Settings with which an engine holds HELD adapters. In the end the cluster is as before."""
    del store
    before = cluster.settings
    bytes_of_one = resident_bytes(cluster)
    yield before.model_copy(update={"adapter_device_bytes": HELD * bytes_of_one})
    cluster.redeploy(before)
    cluster.wait_for("Engine", 2)


def resident_bytes(cluster: LiveCluster) -> int:
    complete(cluster, Asked(LORAS[0], 1, 1))
    found: list[int] = []

    def told() -> bool:
        residency = cluster.http.get(f"/v1/adapters/{LORAS[0]}").json()["residency"]
        found.append(residency["bytes"] if residency["tier"] == "device" else 0)
        return found[-1] > 0

    wait_until(told)
    return found[-1]


def complete(cluster: LiveCluster, asked: Asked) -> None:
    answer = cluster.http.post("/v1/completions", json=asked.body)
    assert answer.status_code == 200, answer.text


def replay(cluster: LiveCluster, name: str) -> tuple[float, float]:
    """Hit rate, and loads to the device for each request, of a Zipf 1.0 load.

    First each adapter is asked for once: what comes after is neither cold nor popular by chance.
    """
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda lora: complete(cluster, Asked(lora, 1, 1)), LORAS))
        warm, loads = counts(cluster, len(LORAS))
        draw = random.Random(15)
        weights = [1 / rank for rank in range(1, len(LORAS) + 1)]
        drawn = draw.choices(LORAS, weights, k=REQUESTS)
        asked = [Asked(lora, seed, 8) for seed, lora in enumerate(drawn)]
        list(pool.map(lambda one: complete(cluster, one), asked))
    routed, loads_after = counts(cluster, REQUESTS, warm.total())
    routed.subtract(warm)
    rate = (routed["device"] + routed["loading"]) / REQUESTS
    each = (loads_after - loads) / REQUESTS
    tell(name, hit_rate=round(rate, 4), loads_per_request=round(each, 4), **routed)
    return rate, each


def counts(cluster: LiveCluster, more: int, before: float = 0.0) -> tuple[Counter[str], float]:
    """Requests by routing's result, and loads to devices, once `more` are counted than `before`."""
    running = {f"ingress-{replica}" for replica, _, _ in cluster.replicas("Ingress")}
    found: Counter[str] = Counter()

    def all_counted() -> bool:
        for result in RESULTS.values():
            told = series(cluster.http, "quickchange_routing_total", result=result)
            found[result] = sum(int(n) for replica, n in told.items() if replica in running)
        return found.total() >= before + more

    wait_until(all_counted)
    running = {f"engine-{replica}" for replica, _, _ in cluster.replicas("Engine")}
    loads = series(cluster.http, "quickchange_adapter_load_seconds_count", tier="device")
    return found, sum(n for replica, n in loads.items() if replica in running)


def test_affinity_hits_95_of_100_and_loads_less_than_chance(
    cluster: LiveCluster, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.redeploy(small)
    cluster.wait_for("Engine", 2)
    cluster.wait_for("Ingress", 2)
    rate, loads = replay(cluster, "routing by adapter")
    monkeypatch.setattr(application, "AdapterRequestRouter", RandomRequestRouter)
    cluster.redeploy(small.model_copy(update={"max_queue": 299}))
    cluster.wait_for("Engine", 2)
    cluster.wait_for("Ingress", 2)
    by_chance, loads_by_chance = replay(cluster, "routing by chance")
    assert rate >= 0.95
    assert rate > by_chance
    assert loads < loads_by_chance / 2
