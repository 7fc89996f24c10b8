"""What a cluster costs beside a single server, with a base so small that all of it is overhead."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import httpx
import pytest
from cluster_harness import LIMIT_SECONDS, LiveCluster
from cluster_streams import LORAS, Asked, Stream, Streams, median_of, tell
from llm_models import LlmModels

from quickchange_bench.load.own_server import OwnServer

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

ROUNDS = 3
SETTINGS = {"QUICKCHANGE_THREADS": "1", "QUICKCHANGE_KV_CACHE_BYTES": str(16 * 1024**2)}


def first_token_seconds(http: httpx.Client) -> float:
    stream = Stream(Asked(LORAS[0], 1, 2)).read(http)
    return stream.first - stream.began


def tokens_per_second(http: httpx.Client, count: int) -> float:
    began = time.monotonic()
    asked = [Asked(LORAS[n % 16], n, 800 if count == 1 else 200) for n in range(count)]
    ended = Streams(http, asked).ended()
    return sum(stream.counted for stream in ended) / (time.monotonic() - began)


def test_a_cluster_streams_as_a_single_server_does(
    cluster: LiveCluster, models: LlmModels, store: Path, tmp_path: Path
) -> None:
    """The figures are printed; that all streams come whole is what is asserted."""
    cluster.wait_for("Engine", 2)
    own = OwnServer(str(models.path), store, environment=SETTINGS)
    with (
        own.running(tmp_path / "server.log") as server,
        httpx.Client(base_url=server.url, timeout=LIMIT_SECONDS) as single,
    ):
        sides = {"single server": single, "cluster": cluster.http}
        for http in sides.values():
            tokens_per_second(http, 16)  # adapters and code are warm
        for name, http in sides.items():
            first = median_of(partial(first_token_seconds, http), 21)
            one = median_of(partial(tokens_per_second, http, 1), ROUNDS)
            many = median_of(partial(tokens_per_second, http, 32), ROUNDS)
            tell(
                name,
                first_token_ms=round(1000 * first, 2),
                one_stream_tokens_per_second=round(one),
                of_32_streams=round(many),
            )
