"""The router in a Serve application of two replicas that have no model, beside a whole cluster."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Iterator
from hashlib import sha256
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from cluster_harness import LiveCluster
from ray import serve
from ray.serve.config import RequestRouterConfig

from quickchange_server.cluster.routing.request_router import AdapterRequestRouter
from quickchange_server.cluster.routing.routing_memory import ROUTED, routing_stats
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.protocol import Component, SamplingParams, Submit

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's sockets and log files
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def handle(cluster: LiveCluster) -> Iterator[Any]:  # noqa: ARG001
    @serve.deployment(
        num_replicas=2,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRequestRouter,
            request_routing_stats_period_s=0.5,
        ),
    )
    class Engine:
        """Holds what it was asked for; a request lasts as many hundredths as its prompt."""

        def __init__(self) -> None:
            self.held: dict[str, Residence] = {}
            self.running = 0

        async def generate(self, submit: Submit) -> AsyncGenerator[int, None]:
            self.running += 1
            for component in submit.adapters:
                self.held[component.digest] = Residence("device", 10, False)
            for _ in submit.prompt:
                yield os.getpid()
                await asyncio.sleep(0.01)
            self.running -= 1

        async def record_routing_stats(self) -> dict[str, Any]:
            return routing_stats(
                self.held, device_bytes=1000, queue=self.running, kv_share=0, step_seconds=0.01
            )

    application = serve.run(Engine.bind(), name="routed", route_prefix=None)
    yield application.options(stream=True)
    serve.delete("routed")


def submit(name: str, digest: str, seconds: float = 0.01) -> Submit:
    prompt = tuple(range(int(seconds * 100)))
    return Submit(name, prompt, SamplingParams(), (Component(digest),), seed=0)


async def replica_of(handle: Any, request: Submit) -> int:
    pids = {pid async for pid in handle.generate.remote(request)}
    assert len(pids) == 1
    return int(pids.pop())


async def _to_its_end(stream: Any) -> None:
    async for _ in stream:
        pass


def test_an_adapter_stays_on_one_replica_and_adapters_spread(handle: Any) -> None:
    async def main() -> None:
        digests = [sha256(bytes([number])).hexdigest() for number in range(16)]
        before = ROUTED.snapshot()
        first = {d: await replica_of(handle, submit(f"a{d}", d)) for d in digests}
        assert len(set(first.values())) == 2
        await asyncio.sleep(2)  # they report
        for name in "bc":
            for digest in digests:
                assert await replica_of(handle, submit(name + digest, digest)) == first[digest]
        after = ROUTED.snapshot()
        assert after["disk"] - before["disk"] == 16
        assert after["device"] - before["device"] >= 30  # a report may be late

    asyncio.run(main())


def test_a_hot_adapter_spreads_over_both_replicas(handle: Any) -> None:
    async def main() -> None:
        calls = [replica_of(handle, submit(f"h{n}", "h" * 64, 1.0)) for n in range(30)]
        pids = await asyncio.gather(*calls)
        assert len(set(pids)) == 2
        assert max(pids.count(pid) for pid in pids) <= 25

    asyncio.run(main())


def test_a_killed_replica_is_replaced_by_the_other_one(handle: Any) -> None:
    async def main() -> None:
        pid = await replica_of(handle, submit("k", "k" * 64))
        stream = handle.generate.remote(submit("k0", "k" * 64, 30.0))
        assert await anext(stream) == pid
        os.kill(pid, 9)
        with pytest.raises(Exception, match=r"died|unavailable|unexpected"):
            await _to_its_end(stream)
        begun = time.monotonic()
        assert await replica_of(handle, submit("k0/2", "k" * 64)) != pid
        assert time.monotonic() - begun < 10

    asyncio.run(main())
