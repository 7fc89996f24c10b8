"""Serve's own router classes with ours among them; no Ray is started."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
from rendezvous import rendezvous

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve._private.request_router.common import PendingRequest

from quickchange_server.cluster.routing.request_router import AdapterRequestRouter
from quickchange_server.cluster.routing.routing_memory import ROUTED, routing_stats
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.protocol import Component, Drafting, Prefetch, SamplingParams, Submit

ENGINES = DeploymentID("engine", "quickchange")


class FakeRunningReplica:
    """What the router asks of a replica."""

    def __init__(self, name: str, stats: dict[str, Any] | None = None, most: int = 1000) -> None:
        self.replica_id = ReplicaID(name, ENGINES)
        self.routing_stats = stats or {}
        self.max_ongoing_requests = most
        self.node_id, self.availability_zone = "node", None
        self.queue = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002
        return self.queue


def stats(
    *device: str, host: tuple[str, ...] = (), queue: int = 0, room: int = 1000
) -> dict[str, Any]:
    residency = {digest: Residence("device", 10, False) for digest in device}
    residency |= {digest: Residence("host", 10, False) for digest in host}
    return routing_stats(residency, device_bytes=room, queue=queue, kv_share=0.1, step_seconds=0.01)


def submit(*digests: str, name: str = "r", prompt: int = 4, heads: str | None = None) -> Submit:
    return Submit(
        name,
        tuple(range(prompt)),
        SamplingParams(),
        tuple(Component(digest) for digest in digests),
        drafting=None if heads is None else Drafting(heads),
        seed=0,
    )


class Routed:
    """A router and its replicas; `send` is what Serve's outer router does for a request."""

    def __init__(self, *replicas: FakeRunningReplica) -> None:
        self.router = AdapterRequestRouter(
            ENGINES, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.router.initialize_state()
        self.replicas = {replica.replica_id: replica for replica in replicas}
        self.update()

    def update(self) -> None:
        self.router.update_replicas(list(self.replicas.values()))

    async def send(self, request: object, internal_id: str = "same") -> str:
        pending = PendingRequest([request], {}, RequestMetadata("http", internal_id))
        replica = await self.router._choose_replica_for_request(pending)
        name: str = replica.replica_id.unique_id
        self.router.on_send_request(replica.replica_id)
        self.replicas[replica.replica_id].queue += 1
        self.router.on_new_queue_len_info(
            replica.replica_id, self.replicas[replica.replica_id].queue
        )
        self.router.on_request_routed(pending, replica.replica_id, SimpleNamespace())
        return name

    def complete(self, name: str) -> None:
        replica_id = ReplicaID(name, ENGINES)
        self.replicas[replica_id].queue -= 1
        self.router.on_request_completed(replica_id, "same")
        self.router.decrement_queue_len_cache(replica_id)


def routing(*replicas: FakeRunningReplica) -> Callable[[Callable[[Routed], Awaitable[None]]], None]:
    """A decorator that runs a coroutine with a router of these replicas."""

    def run(body: Callable[[Routed], Awaitable[None]]) -> None:
        async def main() -> None:
            router = Routed(*replicas)
            await asyncio.sleep(0)  # the queues are asked for
            await asyncio.wait_for(body(router), 20)

        asyncio.run(main())

    return run


def three(**told: dict[str, Any]) -> list[FakeRunningReplica]:
    return [FakeRunningReplica(name, told.get(name)) for name in ("a", "b", "c")]


def test_a_request_goes_where_its_adapter_is() -> None:
    for name in ("a", "b", "c"):

        @routing(*three(**{name: stats("x" * 64)}))
        async def _(router: Routed, name: str = name) -> None:
            assert await router.send(submit("x" * 64)) == name


def test_draft_heads_count_like_adapters() -> None:
    @routing(*three(a=stats("x" * 64), b=stats("x" * 64, "h" * 64)))
    async def _(router: Routed) -> None:
        assert await router.send(submit("x" * 64, heads="h" * 64)) == "b"


def test_a_prefetch_goes_where_requests_for_its_digest_will() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        for number in range(8):
            digest = sha256(bytes([number])).hexdigest()
            home = await router.send(Prefetch(digest))
            router.complete(home)
            assert await router.send(submit(digest, name=f"r{number}")) == home
            router.complete(home)


def test_a_burst_for_a_cold_adapter_loads_it_once() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        sent = [router.send(submit("x" * 64, name=f"r{n}"), f"id{n}") for n in range(5)]
        assert len(set(await asyncio.gather(*sent))) == 1


def test_a_burst_for_a_hot_adapter_spreads_within_the_bound() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        sent = [router.send(submit("x" * 64, name=f"r{n}"), f"id{n}") for n in range(60)]
        placed = Counter(await asyncio.gather(*sent))
        assert sum(placed.values()) == 60
        assert max(placed.values()) <= 1.25 * 20 + 5 + 1


def test_choices_of_one_http_request_are_all_routed() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        sent = [router.send(submit("x" * 64, name=f"r-{n}"), "one") for n in range(9)]
        assert len(await asyncio.gather(*sent)) == 9


def test_a_sequence_that_was_lost_goes_to_another_replica() -> None:
    @routing(*three(a=stats("x" * 64)))
    async def _(router: Routed) -> None:
        first = submit("x" * 64)
        assert await router.send(first) == "a"
        again = await router.send(replace(first, request_id="r/2", output=(1, 2)))
        assert again != "a"
        third = await router.send(replace(first, request_id="r/3", output=(1, 2)))
        assert third != again
        assert await router.send(submit("x" * 64, name="other")) == "a"


def test_a_dead_replica_gets_nothing() -> None:
    @routing(*three(a=stats("x" * 64)))
    async def _(router: Routed) -> None:
        router.router.on_replica_actor_died(ReplicaID("a", ENGINES))
        assert await router.send(submit("x" * 64)) in ("b", "c")


def test_a_replica_whose_queue_is_full_is_passed_over() -> None:
    replicas = three(a=stats("x" * 64))
    replicas[0].max_ongoing_requests = 1

    @routing(*replicas)
    async def _(router: Routed) -> None:
        assert await router.send(submit("x" * 64, name="r1")) == "a"
        assert await router.send(submit("x" * 64, name="r2")) in ("b", "c")


def test_a_conversation_stays_where_its_beginning_was_computed() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        first = await router.send(submit(name="turn1", prompt=300))
        router.complete(first)
        busy = {name for n in range(2) if (name := await router.send(submit(name=f"o{n}")))}
        assert len(busy) == 2
        assert await router.send(submit(name="turn2", prompt=400)) == first


def test_what_the_plain_base_is_asked_goes_to_the_least_loaded() -> None:
    @routing(*three())
    async def _(router: Routed) -> None:
        sent = [await router.send(submit(name=f"r{n}")) for n in range(30)]
        assert set(Counter(sent).values()) == {10}


def test_routed_requests_are_counted_by_where_their_adapter_was() -> None:
    home, other, _last = rendezvous(["a", "b", "c"], ["y" * 16])
    told = {home: stats("x" * 64), other: stats(host=("z" * 64,))}

    @routing(*three(**told))
    async def _(router: Routed) -> None:
        before = ROUTED.snapshot()
        for number, digest in enumerate(("x" * 64, "y" * 64, "y" * 64, "z" * 64)):
            router.complete(await router.send(submit(digest, name=f"r{number}")))
        router.complete(await router.send(Prefetch("w" * 64)))
        router.complete(await router.send(submit(name="base")))
        after = ROUTED.snapshot()
        assert {held: after[held] - before[held] for held in after} == {
            "device": 1,
            "loading": 1,
            "host": 1,
            "disk": 1,
        }


def test_a_report_replaces_what_was_believed() -> None:
    replicas = three()

    @routing(*replicas)
    async def _(router: Routed) -> None:
        first = await router.send(submit("x" * 64, name="r1"))
        router.complete(first)
        other = next(r for r in replicas if r.replica_id.unique_id != first)
        replicas[0].routing_stats = stats()
        other.routing_stats = stats("x" * 64)
        await asyncio.sleep(0)
        router.router._memory._clock = lambda: 1e12  # what was believed has lapsed
        router.update()
        assert await router.send(submit("x" * 64, name="r2")) == other.replica_id.unique_id
