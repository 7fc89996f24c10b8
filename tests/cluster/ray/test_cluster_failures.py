"""What is lost, and what of it users see: engines, nodes and the board."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from cluster_harness import LiveCluster, wait_until
from cluster_streams import LORAS, Asked, Stream, Streams, expected, series, tell

from quickchange_server.entrypoints.llm import LLM

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

TOKENS = 400


def thirty_two(first_seed: int) -> list[Asked]:
    """Two streams for each of sixteen adapters."""
    return [Asked(LORAS[n % 16], first_seed + n, TOKENS) for n in range(32)]


def check(streams: Sequence[Stream], single: LLM) -> None:
    """Nothing is lost and nothing is doubled: texts, tokens and their number."""
    said = expected(single, [stream.asked for stream in streams])
    assert [stream.said for stream in streams] == said
    assert {stream.counted for stream in streams} == {TOKENS}


def test_kill_9_of_an_engine_is_a_pause_of_32_streams_over_16_adapters(
    cluster: LiveCluster, single: LLM
) -> None:
    cluster.wait_for("Engine", 2)
    before = resumed(cluster)
    streams = Streams(cluster.http, thirty_two(100))
    streams.wait_for_tokens(20)
    cluster.kill("Engine")
    ended = streams.ended()
    check(ended, single)
    pauses = sorted(stream.pause for stream in ended)
    tell(
        "kill -9 of an engine",
        streams=32,
        median=round(pauses[16], 2),
        longest=round(pauses[-1], 2),
    )
    wait_until(lambda: resumed(cluster) > before)  # the engine that was killed had streams
    cluster.wait_for("Engine", 2)


def test_a_removed_node_is_a_pause_of_32_streams_over_16_adapters(
    cluster: LiveCluster, single: LLM
) -> None:
    cluster.redeploy(ingresses=1)
    cluster.wait_for("Ingress", 1)
    cluster.wait_for("Engine", 2)
    (kept,) = (node for _, _, node in cluster.replicas("Ingress"))  # whose own streams would end
    node = next(node for _, _, node in cluster.replicas("Engine") if node != kept)
    streams = Streams(cluster.http, thirty_two(200))
    streams.wait_for_tokens(20)
    cluster.nodes.remove_node(cluster.node_of(node), allow_graceful=False)
    try:
        ended = streams.ended()
    finally:
        cluster.nodes.add_node(num_cpus=1)
    check(ended, single)
    pauses = sorted(stream.pause for stream in ended)
    tell("removal of a node", streams=32, median=round(pauses[16], 2), longest=round(pauses[-1], 2))
    cluster.redeploy(ingresses=2)
    cluster.wait_for("Engine", 2)
    cluster.wait_for("Ingress", 2)


def test_the_board_killed_is_nothing_to_requests_and_pins_and_metrics_come_back(
    cluster: LiveCluster, single: LLM
) -> None:
    cluster.wait_for("Engine", 2)
    engines = {f"engine-{replica}" for replica, _, _ in cluster.replicas("Engine")}
    digest = cluster.http.get("/v1/adapters/sql").json()["digest"]
    cluster.http.post("/v1/adapters/sql/pin").raise_for_status()
    wait_until(lambda: told(cluster)["pins"] == [digest])
    streams = Streams(cluster.http, thirty_two(400)[:8])
    streams.wait_for_tokens(5)
    killed = time.time()
    cluster.kill("Board")
    short = Asked("orders", 450, 20)
    assert Stream(short).read(cluster.http).said == expected(single, [short])[0]
    check(streams.ended(), single)

    def back() -> bool:
        document = told(cluster)
        heard = {one["id"] for one in document["data"] if one["reported"] > killed}
        return engines <= heard and document["pins"] == [digest]

    wait_until(back)
    tell("the board killed", seconds_to_its_successors_view=round(time.time() - killed, 1))
    wait_until(lambda: engines <= set(series(cluster.http, "quickchange_requests_running")))
    cluster.http.post("/v1/adapters/sql/unpin").raise_for_status()
    wait_until(lambda: told(cluster)["pins"] == [])


def resumed(cluster: LiveCluster) -> float:
    """Streams that went on at another engine."""
    return sum(series(cluster.http, "quickchange_stream_resumes_total").values())


def told(cluster: LiveCluster) -> Any:
    """The cluster as one of its ingresses last heard of it."""
    return cluster.http.get("/v1/cluster").raise_for_status().json()
