"""What an ingress knows of its cluster: state, limits, adapters, pins; and commands."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from client_support import deltas_of, generation, make_settings, run, tokens_of, until
from fake_engine import expected_tokens
from fake_replicas import READY, FakeReplicas, cluster_client, hurried

from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.remote import cluster_watch
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.errors import UnavailableError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Forget, Pin, Prefetch


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


async def next_look(calls: FakeReplicas) -> None:
    """Until a look that has begun after this call is done."""
    seen = calls.looks
    await until(lambda: calls.looks > seen + 1)


def test_the_start_waits_for_the_first_replica_that_serves() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(2)
        for replica in calls.replicas:
            replica.state = "starting"
        settings = make_settings()
        client = EngineClient(
            settings, Metrics(settings), lambda *given: RemoteEngines(*given, calls=calls)
        )
        starting = asyncio.create_task(client.start())
        await next_look(calls)
        assert client.state == "starting"
        with pytest.raises(UnavailableError, match="starting"):
            client.generate([generation("a")])
        calls.replicas[1].state = "ready"
        assert await starting == READY
        assert client.state == "ready"
        await client.close(0)
        assert client.state == "draining"

    run(scenario())


def test_a_start_that_is_called_off_leaves_nothing() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(0)
        before = asyncio.all_tasks()
        settings = make_settings()
        client = EngineClient(
            settings, Metrics(settings), lambda *given: RemoteEngines(*given, calls=calls)
        )
        starting = asyncio.create_task(client.start())
        await next_look(calls)
        starting.cancel()
        await asyncio.wait([starting])
        await client.close(0)
        assert asyncio.all_tasks() == before

    run(scenario())


def test_the_context_is_the_smallest_of_the_replicas_that_serve() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(3)
        calls.replicas[1].info = replace(READY, max_model_len=512)
        calls.replicas[2].info = replace(READY, max_model_len=64)
        calls.replicas[2].state = "starting"
        async with cluster_client(calls) as client:
            assert client.engine.max_model_len == 512
            calls.replicas[2].state = "ready"
            await until(lambda: client.engine.max_model_len == 64)
            for replica in calls.replicas:
                replica.state = "dead"
            await until(lambda: client.state == "restarting")
            assert client.engine.max_model_len == 64
            assert client.pid is None

    run(scenario())


def test_the_state_outlives_looks_that_fail_for_a_while_and_requests_run_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        async with cluster_client(calls) as client:
            calls.broken = True
            await asyncio.sleep(cluster_watch.STALE_SECONDS / 2)
            assert client.state == "ready"
            await until(lambda: client.state == "restarting")
            wanted = generation("a", 20)
            assert tokens_of(await deltas_of(client, wanted)) == expected_tokens(wanted)
            await asyncio.sleep(1.5 * cluster_watch.PATIENCE_SECONDS)
            assert client.state == "restarting"  # engines may be well, though nobody tells of them
            calls.broken = False
            await until(lambda: client.state == "ready")
            for replica in calls.replicas:
                replica.state = "dead"
            await until(lambda: client.state == "failed")

    run(scenario())
    assert caplog.text.count("view can't be had") == 1


def test_a_look_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_watch, "CALL_SECONDS", 0.02)

    async def scenario() -> None:
        calls = FakeReplicas()
        looks = calls.view
        async with cluster_client(calls) as client:
            calls.view = asyncio.Event().wait  # type: ignore[method-assign, assignment]
            await until(lambda: client.state == "restarting")
            calls.view = looks  # type: ignore[method-assign]
            await until(lambda: client.state == "ready")

    run(scenario())


def test_an_adapter_on_several_replicas_counts_on_its_fastest_tier() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(3)
        calls.replicas[0].residency = {
            "both": Residence("host", 900, False),
            "here": Residence("host", 10, False),
        }
        calls.replicas[1].residency = {
            "both": Residence("device", 100, True),
            "there": Residence("device", 30, False),
        }
        calls.replicas[2].residency = {"both": Residence("device", 120, False)}
        async with cluster_client(calls) as client:
            assert client.residency.snapshot() == {
                "both": Residence("device", 120, False),
                "here": Residence("host", 10, False),
                "there": Residence("device", 30, False),
            }
            client.pin("both", True)
            assert client.residency["both"].pinned
            await next_look(calls)
            assert client.residency["both"].pinned
            calls.replicas[2].state = "dead"
            await until(lambda: client.residency["both"] == Residence("device", 100, True))
            calls.replicas[1].state = "dead"
            await until(lambda: set(client.residency) == {"both", "here"})

    run(scenario())


def test_commands_get_there_in_order_also_after_failures() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        async with cluster_client(calls) as client:
            calls.broken = True
            client.prefetch("a", "host")
            client.forget("a")
            client.prefetch("b")
            await asyncio.sleep(0.02)
            assert not calls.commands
            calls.broken = False
            wanted = [Prefetch("a", "host"), Forget("a"), Prefetch("b")]
            await until(lambda: calls.commands == wanted)

    run(scenario())


def test_a_command_that_can_not_be_sent_is_dropped_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        async with cluster_client(calls) as client:
            calls.broken = True
            client.prefetch("lost")
            await until(lambda: "could not be sent" in caplog.text)
            calls.broken = False
            client.prefetch("next")
            await until(lambda: calls.commands == [Prefetch("next")])

    run(scenario())
    assert "Prefetch(digest='lost'" in caplog.text


def test_pins_of_all_ingresses_are_known_and_a_new_board_gets_them_again() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.pins = {"theirs": None}
        async with cluster_client(calls) as client:
            client.pin("ours", True)
            client.pin("let go", True)
            client.pin("let go", False)
            await until(lambda: set(calls.pins) == {"theirs", "ours"})
            await until(lambda: set(client.residency.pins) == {"theirs", "ours"})
            calls.board, calls.pins = "board-2", {}
            await until(lambda: set(calls.pins) == {"theirs", "ours"})
            del calls.pins["ours"]  # by another ingress
            await until(lambda: client.residency.pins == ("theirs",))
            await next_look(calls)
            assert set(calls.pins) == {"theirs"}

    run(scenario())


def test_a_pin_that_got_lost_on_the_way_is_sent_until_a_view_has_it() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        async with cluster_client(calls) as client:
            calls.broken = True
            client.pin("kept", True)
            client.pin("forgotten", True)
            client.forget("forgotten")
            await asyncio.sleep(4 * cluster_watch.COMMAND_SECONDS)
            calls.broken = False
            await until(lambda: set(calls.pins) == {"kept"})
            await next_look(calls)
            sent = len(calls.commands)
            await next_look(calls)
            assert len(calls.commands) == sent
        assert calls.commands[-1] in (Pin("kept", True), Forget("forgotten"))

    run(scenario())
