"""A cluster that is changed while it answers: upgrades, and more and fewer engines."""

from __future__ import annotations

import time

import pytest
from cluster_harness import LiveCluster
from cluster_streams import LORAS, Asked, Load, expected, tell, under_load

from quickchange_server.entrypoints.llm import LLM

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

ADAPTERS = (None, *LORAS[:15])
ASKED = [Asked(ADAPTERS[n % 16], 300 + n, 120 + 10 * (n % 7)) for n in range(32)]
CLIENTS = 4


def ids(cluster: LiveCluster) -> set[str]:
    return {replica for kind in ("Engine", "Ingress") for replica, _, _ in cluster.replicas(kind)}


def check(load: Load, single: LLM, name: str, began: float) -> None:
    """No request has failed, and each has its text."""
    seconds = time.monotonic() - began
    pauses = sorted(stream.pause for stream in load.answers)
    tell(
        name,
        seconds=round(seconds, 1),
        answers=len(load.answers),
        longest_pause=round(pauses[-1], 2),
    )
    assert load.failures == []
    right = dict(zip(ASKED, expected(single, ASKED), strict=True))
    for stream in load.answers:
        assert stream.said == right[stream.asked]


def test_a_rolling_upgrade_under_load_fails_no_request(cluster: LiveCluster, single: LLM) -> None:
    cluster.wait_for("Engine", 2)
    old = ids(cluster)
    began = time.monotonic()
    with under_load(cluster.http, ASKED, CLIENTS) as load:
        cluster.redeploy(cluster.settings.model_copy(update={"max_queue": 300}))
        cluster.wait_for("Engine", 2)
        answered = len(load.answers)
    assert not old & ids(cluster), "a replica was not replaced"
    assert len(load.answers) > answered
    check(load, single, "rolling upgrade", began)


def test_scaling_2_3_1_under_load_fails_no_request(cluster: LiveCluster, single: LLM) -> None:
    cluster.wait_for("Engine", 2)
    two, began = ids(cluster), time.monotonic()
    with under_load(cluster.http, ASKED, CLIENTS) as load:
        cluster.redeploy(engines=3)
        cluster.wait_for("Engine", 3)
        three = ids(cluster)
        cluster.redeploy(engines=1)
        cluster.wait_for("Engine", 1)
        answered = len(load.answers)
    assert two < three, "a replica was replaced for more of them"
    assert ids(cluster) < three
    assert len(load.answers) > answered
    check(load, single, "scaling 2, 3, 1", began)
    cluster.redeploy(engines=2)
