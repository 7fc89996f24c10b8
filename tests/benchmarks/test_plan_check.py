"""A plan held against what was measured: the table, and what is read of a server's metrics."""

from __future__ import annotations

import pytest

from quickchange_bench.service import plan_check
from quickchange_bench.service.plan_check import Replayed, check_plan, cluster_of
from quickchange_server.cluster.simulation.replica_model import ReplicaModel
from quickchange_server.cluster.simulation.traffic import TracedRequest

MODEL = ReplicaModel(
    prices=((1, 0.01), (2, 0.011)),
    adapter_bytes=10,
    adapter_device_bytes=40,
    adapter_host_bytes=40,
    kv_tokens=1000,
    store_seconds=0.1,
    copy_seconds=0.0,
)
TRACE = [TracedRequest(float(n), "a", 1, 1) for n in range(10)]


def rows_of(replayed: Replayed) -> dict[str, list[str]]:
    text = check_plan(TRACE, cluster_of(MODEL, 2, 1), replayed)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:7]]
    return {row[0]: row[1:] for row in cells}


def test_the_model_stands_beside_what_was_measured() -> None:
    found = rows_of(Replayed((0.02,) * 9 + (0.2,), 0.015, 0.9, 1.0, ()))
    # One row costs 10 ms; a lone request took 5 ms longer, which is not the engine's.
    assert found["first token p50, ms"] == ["20", "15", "0.75"]
    assert found["on device"] == ["0.9", "0.9", "1.00"]
    assert found["loads from the store"] == ["1", "1", "1.00"]


def test_a_server_that_routes_nothing_has_no_rate_to_compare() -> None:
    assert rows_of(Replayed((0.02,), 0.01, None, 0.0, ()))["on device"] == ["-", "0.9", "-"]


def test_failures_are_told() -> None:
    text = check_plan(
        TRACE, cluster_of(MODEL, 2, 1), Replayed((0.02,), 0.01, None, 0.0, ("status 503",))
    )
    assert text.endswith("1 failed: status 503")


def test_metrics_are_summed_over_replicas_and_counted_from_the_start() -> None:
    def series(device: float, disk: float) -> plan_check.Series:
        name = "quickchange_routing_total"
        return {
            (name, frozenset({("replica", replica), ("result", result)})): value
            for replica, share in (("ingress-1", 0.5), ("ingress-2", 0.5))
            for result, value in (("device", share * device), ("disk", share * disk))
        }

    assert plan_check._hit_rate(series(10, 10), series(40, 20)) == pytest.approx(0.75)
    assert plan_check._hit_rate({}, {}) is None
