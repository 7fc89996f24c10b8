"""`quickchange_adapter_resident` against the allocator, and against GET /v1/adapters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from cluster_support import FakeCluster, Replica
from http_support import Live, live_server, make_adapter, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from residency_bench import Bench, bench

from quickchange_server.adapters.manager import Residency
from quickchange_server.engine_client.adapter_status import AdapterStatus
from quickchange_server.observability.cluster_metrics import exposition_of_all
from quickchange_server.observability.gateways.resident_adapters import resident
from quickchange_server.observability.naming.labels import AdapterLabels
from quickchange_server.protocol import AdapterFailed, AdapterMoved
from quickchange_store.store import Store

NAME = "quickchange_adapter_resident"
Told = Counter[tuple[str, ...]]  # versions by adapter, tier, pinned, rank


def told_in(families: Any) -> Told:
    told: Told = Counter()
    family: Metric
    for family in families:
        for sample in family.samples:
            if sample.name == NAME:
                labels = sample.labels
                told[tuple(labels[key] for key in ("adapter", "tier", "pinned", "rank"))] += int(
                    sample.value
                )
    return told


def allocated(residency: Residency) -> Told:
    """What the allocator holds. A write that is under way has not been told yet."""
    told: Told = Counter()
    for entry in residency._entries.values():
        tier = "device" if entry.resident else "host" if entry.image is not None else "disk"
        if tier != "disk":
            told[entry.digest, tier, str(entry.pinned).lower(), str(entry.rank)] += 1
    return told


class Client:
    """The API process's side: it sends pins, and hears events."""

    def __init__(self, made: Bench) -> None:
        self.bench, self.heard, self.status = made, 0, AdapterStatus()

    def pin(self, digest: str, pinned: bool) -> None:
        self.status.pin(digest, pinned)
        self.bench.residency.pin(digest, pinned)

    def forget(self, digest: str) -> None:
        self.status.forget(digest)
        self.bench.residency.forget(digest)

    def told(self) -> Told:
        self.bench.settle()
        for event in self.bench.events[self.heard :]:
            match event:
                case AdapterMoved():
                    self.status.moved(event)
                case AdapterFailed():
                    self.status.pin(event.digest, False)
        self.heard = len(self.bench.events)
        return told_in(resident({None: self.status.snapshot()}, lambda digest: digest))


DIGESTS = st.sampled_from(["s1a", "s3b", "l1c", "l4d", "l8e", "l8f", "t2g", "b1h", "x1i"])
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["use", "host", "device", "pin", "unpin", "forget"]), DIGESTS),
    st.tuples(st.just("break"), DIGESTS),
)


@settings(deadline=None, max_examples=60)
@given(actions=st.lists(ACTIONS, max_size=25))
def test_after_loads_evictions_pins_failures_and_unloads_it_is_the_allocators_state(
    actions: list[tuple[str, str]],
) -> None:
    with bench(host=12_000) as made:
        client = Client(made)
        for number, (action, digest) in enumerate(actions):
            match action:
                case "use":
                    made.residency.claim(str(number), [digest])
                    made.settle()
                    made.residency.ready(str(number))
                    made.residency.release(str(number))
                case "host" | "device":
                    made.residency.prefetch(digest, action)  # type: ignore[arg-type]
                case "pin" | "unpin":
                    client.pin(digest, action == "pin")
                case "forget":
                    client.forget(digest)
                case "break":
                    made.store.broken ^= {digest}
            assert client.told() == allocated(made.residency)


def test_the_rank_is_that_of_the_widest_update() -> None:
    with bench() as made:
        client = Client(made)
        made.use("l4a")
        made.use("s2b")
        made.use("t1c")  # heads alone
        assert client.told() == {
            ("l4a", "device", "false", "32"): 1,
            ("s2b", "device", "false", "16"): 1,
            ("t1c", "device", "false", "0"): 1,
        }


def listed(live: Live) -> Counter[tuple[str, str, bool]]:
    """What GET /v1/adapters says is in memory."""
    data = live.http.get("/v1/adapters").json()["data"]
    there = [(a["id"], a["residency"]["tier"], a["residency"]["pinned"]) for a in data]
    return Counter(each for each in there if each[1] != "disk")


def scraped(live: Live) -> Counter[tuple[str, str, bool]]:
    told = told_in(text_string_to_metric_families(live.http.get("/metrics").text))
    return Counter(
        {(name, tier, pinned == "true"): n for (name, tier, pinned, _), n in told.items()}
    )


def test_a_server_tells_the_same_as_its_list_of_adapters(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, name in enumerate(("orders", "tickets", "sql")):
        store.add(name, make_adapter(1.0 + number))
    with live_server(tmp_path) as live:
        assert scraped(live) == listed(live) == Counter()
        live.post("/v1/completions", {"model": "orders", "prompt": "a", "max_tokens": 1})
        live.post("/v1/adapters/tickets/pin", {})  # no request has named it
        live.post("/v1/adapters/sql/prefetch", {})
        wait_until(lambda: len(listed(live)) == 3)
        assert scraped(live) == listed(live)
        assert scraped(live)["tickets", "device", True] == 1
        live.post("/v1/adapters/tickets/unpin", {})
        live.http.delete("/v1/adapters/orders")
        wait_until(lambda: ("orders", "device", False) not in scraped(live))
        assert scraped(live) == listed(live)


def test_a_cluster_tells_each_replicas_adapters() -> None:
    engines = Replica("engine-1"), Replica("engine-2")
    for engine in engines:
        engine.hold("d", "orders")
    cluster = FakeCluster(*engines)
    registry = Replica("ingress-1", "ingress").metrics.registry
    text = exposition_of_all(registry, cluster.seen, lambda _digest: "orders").decode()
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == NAME
    ]
    assert [(s.labels["replica"], s.labels["adapter"], s.value) for s in samples] == [
        ("engine-1", "orders", 1),
        ("engine-2", "orders", 1),
    ]


def test_adapters_beyond_the_bound_are_counted_together() -> None:
    status, labels = AdapterStatus(), AdapterLabels(1)
    for digest in "abc":
        status.moved(AdapterMoved(digest, "device", "load", 0.0, 10, rank=8))
    told = told_in(resident({None: status.snapshot()}, labels))
    assert told == {("a", "device", "false", "8"): 1, ("other", "device", "false", "8"): 2}
