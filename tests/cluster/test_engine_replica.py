"""An engine replica over the fake engine: its streams, its reports, its start and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

import fake_engine
from client_support import make_settings, run
from fake_engine import ADAPTER_BYTES, Behaviour, token_at

from quickchange_server.cluster import engine_deployment, serve_replica
from quickchange_server.cluster.board import BoardServer
from quickchange_server.cluster.engine_deployment import Demand, EngineReplica
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.errors import AdapterFailedError, EngineFailedError
from quickchange_server.protocol import (
    Component,
    Delta,
    Drafting,
    Forget,
    Pin,
    SamplingParams,
    Submit,
)

A, B = "a" * 64, "b" * 64


class BoardHandle:
    """Serve's handle of a board in this process."""

    def __init__(self) -> None:
        self.server = BoardServer()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.server, name))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Empty until Serve asks the replica to end."""
    asked: list[bool] = []
    monkeypatch.setattr(serve_replica, "label", lambda: "engine-test")
    monkeypatch.setattr(serve_replica, "node", lambda: "node")
    monkeypatch.setattr(serve_replica, "log", lambda: None)
    monkeypatch.setattr(serve_replica, "leave_main_alone", lambda: None)
    monkeypatch.setattr(serve_replica, "is_stopping", lambda: bool(asked))
    monkeypatch.setattr(engine_deployment, "REPORT_SECONDS", 0.02)
    monkeypatch.setattr(engine_deployment, "WARM_SECONDS", 1.0)
    return asked


@asynccontextmanager
async def replica_of(
    board: BoardHandle, behaviour: Behaviour | None = None, **changes: Any
) -> AsyncIterator[EngineReplica]:
    main = partial(fake_engine.main, behaviour=behaviour or Behaviour())
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(make_settings(**changes), board, main)  # type: ignore[func-returns-value]
    try:
        yield replica
    finally:
        await replica.end()
        replica._open = False


def submit(
    name: str, count: int, *digests: str, output: tuple[int, ...] = (), seed: int = 7
) -> Submit:
    adapters = tuple(Component(digest) for digest in digests)
    return Submit(name, (1, 2, 3), SamplingParams(max_tokens=count), adapters, output, seed=seed)


async def items_of(replica: EngineReplica, wanted: Submit) -> list[Any]:
    label, *items = [item async for item in replica.generate(wanted)]
    assert label == "engine-test"
    return items


def tokens_of(items: list[Any]) -> list[int]:
    assert all(isinstance(item, tuple) for item in items), items
    return [token for batch in items for delta in batch for token in delta.token_ids]


def expected(count: int, *digests: str) -> list[int]:
    adapters = tuple(Component(digest) for digest in digests)
    return [token_at(7, 3 + position, adapters) for position in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("stopping")
def test_a_sequence_streams_all_its_tokens_once_and_goes_on_where_another_replica_stood() -> None:
    async def scenario() -> None:
        async with replica_of(BoardHandle()) as replica:
            items = await items_of(replica, submit("r", 30, A))
            assert tokens_of(items) == expected(30, A)
            assert items[-1][-1].finish_reason == "length"
            rest = await items_of(replica, submit("r/2", 30, A, output=tuple(expected(12, A))))
            assert tokens_of(rest) == expected(30, A)[12:]

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_what_piles_up_comes_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_deployment, "PACE_SECONDS", 0.05)

    async def scenario() -> None:
        async with replica_of(BoardHandle(), Behaviour(step_seconds=0.002)) as replica:
            items = await items_of(replica, submit("r", 60))
            assert tokens_of(items) == expected(60)
            assert len(items) < 30

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_the_first_token_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_deployment, "PACE_SECONDS", 3600.0)

    async def scenario() -> None:
        async with replica_of(BoardHandle()) as replica:
            stream = replica.generate(submit("r", 10_000))
            async with asyncio.timeout(60):
                await anext(stream)
                assert tokens_of([await anext(stream)])[0] == expected(1)[0]
            await stream.aclose()

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_an_error_comes_as_the_last_item() -> None:
    async def scenario() -> None:
        async with replica_of(BoardHandle(), Behaviour(missing=frozenset([B]))) as replica:
            items = await items_of(replica, submit("r", 5, B))
            assert [type(item) for item in items] == [AdapterFailedError]

    run(scenario())


@pytest.mark.usefixtures("stopping")
@pytest.mark.parametrize("state", ["failed", "draining"])
def test_what_comes_to_a_replica_without_an_engine_is_given_back(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with replica_of(BoardHandle()) as replica:
            with monkeypatch.context() as patched:
                patched.setattr(EngineClient, "state", property(lambda _: state))
                (item,) = await items_of(replica, submit("r", 5))
            assert isinstance(item, ReplicaLostError)
            assert item.given_back

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_closing_a_stream_cancels_its_sequence_in_the_engine() -> None:
    async def scenario() -> None:
        async with replica_of(BoardHandle(), Behaviour(step_seconds=0.01)) as replica:
            stream = replica.generate(submit("r", 10_000))
            await anext(stream)
            await anext(stream)
            assert replica._client.in_flight == 1
            await stream.aclose()
            assert replica._client.in_flight == 0

    run(scenario())


def test_a_replica_that_is_to_end_gives_back_what_still_runs_after_its_time(
    stopping: list[bool],
) -> None:
    async def scenario() -> None:
        board = BoardHandle()
        slow = Behaviour(step_seconds=0.01)
        async with replica_of(board, slow, drain_seconds=0.3) as replica:
            short = asyncio.create_task(items_of(replica, submit("short", 15)))
            long = asyncio.create_task(items_of(replica, submit("long", 10_000)))
            await until(lambda: replica._client.in_flight == 2)
            stopping.append(True)
            assert tokens_of(await short) == expected(15)
            items = await long
            assert isinstance(items[-1], ReplicaLostError)
            assert items[-1].given_back
            given = tokens_of(items[:-1])
            assert given == expected(len(given))
            [late] = await items_of(replica, submit("late", 5))
            assert isinstance(late, ReplicaLostError)
            assert late.given_back
            assert (await board.server.view()).replicas[0].state == "draining"

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_the_board_hears_of_the_replicas_state_and_of_its_end() -> None:
    async def scenario() -> None:
        board = BoardHandle()
        async with replica_of(board) as replica:
            await items_of(replica, submit("r", 5, A))
            [report] = (await board.server.view()).replicas
            assert (report.replica, report.kind, report.node) == ("engine-test", "engine", "node")
            assert report.serves
            assert report.info is not None
            await until(lambda: A in replica._figures_now().residency)
            stats = await replica.record_routing_stats()
            assert stats["queue"] == 0
            assert set(await replica.record_autoscaling_stats()) == {"queue", "kv_share"}
        assert (await board.server.view()).replicas == ()

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_pins_and_dropped_versions_reach_the_engine_by_the_board() -> None:
    async def scenario() -> None:
        board = BoardHandle()
        async with replica_of(board) as replica:
            residency = replica._client.residency
            await board.server.command(Pin(A, True))
            await until(lambda: A in residency.pins and A in residency)
            await board.server.command(Pin(A, False))
            await until(lambda: A not in residency.pins)
            await board.server.command(Forget(A))
            await until(lambda: A not in residency)

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_a_new_board_unpins_nothing_before_it_has_heard_of_the_pins() -> None:
    async def scenario() -> None:
        board = BoardHandle()
        async with replica_of(board) as replica:
            residency = replica._client.residency
            await board.server.command(Pin(A, True))
            await until(lambda: A in residency.pins)
            board.server = BoardServer()
            await until(lambda: replica._heard.board == board.server._board.id)
            assert A in residency.pins

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_a_new_replica_holds_what_requests_ask_for_most_before_it_takes_any() -> None:
    async def scenario() -> None:
        board = BoardHandle()
        held = {digit * 64: Residence("device", ADAPTER_BYTES, False) for digit in "0123456789"}
        report = ReplicaReport("engine-old", "engine", "node", "ready", residency=held)
        demand = {digest: float(int(digest[0])) for digest in held} | {"f" * 64: 99.0}
        await board.server.report(report, demand, "", 0)
        budget = int(3.5 * ADAPTER_BYTES)
        async with replica_of(board, adapter_device_bytes=budget) as replica:
            assert set(replica._client.residency) == {"9" * 64, "8" * 64, "7" * 64}

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_a_replica_starts_without_a_board() -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            def remote(*_: Any) -> Any:
                raise ReplicaLostError("no board")

            return SimpleNamespace(remote=remote)

    async def scenario() -> None:
        async with replica_of(Silent()) as replica:  # type: ignore[arg-type]
            assert tokens_of(await items_of(replica, submit("r", 5))) == expected(5)

    run(scenario())


@pytest.mark.usefixtures("stopping")
def test_an_engine_that_cannot_start_ends_the_replicas_start_with_its_reason() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineFailedError, match="no such model"):
            async with replica_of(BoardHandle(), Behaviour(refusal="no such model")):
                pass

    run(scenario())


def test_demand_forgets_what_is_no_longer_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(engine_deployment.time, "monotonic", lambda: now[0])
    demand = Demand()
    demand.add([A, A, B])
    assert demand.most() == {A: 2.0, B: 1.0}
    now[0] += engine_deployment.HALF_LIFE_SECONDS
    demand.add([B])
    assert demand.most() == {A: 1.0, B: 1.0}
    now[0] += 20 * engine_deployment.HALF_LIFE_SECONDS
    assert demand.most() == {}


def test_a_delta_is_what_the_engine_told() -> None:
    assert engine_deployment._delta((0, Delta("r", (1,)))) == Delta("r", (1,))


@pytest.mark.usefixtures("stopping")
def test_adapters_have_in_the_metrics_the_names_that_ingresses_know_them_by() -> None:
    drafting = Drafting(heads=B)
    named = replace(submit("r", 30, A), drafting=drafting, label="orders", drafter="fast")

    async def scenario() -> None:
        async with replica_of(BoardHandle()) as replica:
            await items_of(replica, named)
            residency = replica._client.residency
            assert (residency.label(A), residency.label(B)) == ("orders", "fast")

    run(scenario())


def test_what_is_asked_for_is_the_same_under_another_name() -> None:
    assert replace(submit("r", 30, A), label="orders") == submit("r", 30, A)
