"""Streams, admission and drain of the engine's client, over a real process with a fake engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fake_engine
import pytest
from client_support import (
    client_of,
    deltas_of,
    generation,
    make_client,
    make_settings,
    next_of,
    rest_of,
    run,
    tokens_of,
    until,
)
from fake_engine import Behaviour, entries, expected_tokens

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.errors import (
    AdapterFailedError,
    EngineFailedError,
    QueueFullError,
    UnavailableError,
)
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Component, Delta, Drafting, SamplingParams, Submit


def test_a_stream_has_every_token_once_and_ends_with_a_finish_reason() -> None:
    async def scenario() -> None:
        async with client_of() as client:
            wanted = generation("a", max_tokens=20)
            deltas = await deltas_of(client, wanted)
        tokens = tokens_of(deltas)
        assert tokens == expected_tokens(wanted)
        assert [d.finish_reason for d in deltas] == [None] * 19 + ["length"]

    run(scenario())


def test_requests_share_the_engine_and_are_told_apart() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.002)) as client:
            wanted = [generation(f"r{i}", 10 + i, adapters=(Component(f"d{i}"),)) for i in range(8)]
            streams = await asyncio.gather(
                *(deltas_of(client, w, label=f"a{i}") for i, w in enumerate(wanted))
            )
        for w, deltas in zip(wanted, streams, strict=True):
            tokens = tokens_of(deltas)
            assert tokens == expected_tokens(w)

    run(scenario())


def test_an_adapter_that_fails_to_load_raises_its_reason() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(missing=frozenset({"gone"}))) as client:
            wanted = generation("a", adapters=(Component("gone"),))
            with pytest.raises(AdapterFailedError, match="gone could not be loaded"):
                await deltas_of(client, wanted, label="x")
            assert client.in_flight == 0

    run(scenario())


@pytest.mark.parametrize("broken", ["lora", "heads"])
def test_a_failed_load_names_the_turbo_unless_it_is_one_of_the_adapters(broken: str) -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(missing=frozenset({broken}))) as client:
            beside = generation("a", adapters=(Component("lora"),), drafting=Drafting("heads"))
            with pytest.raises(AdapterFailedError, match=r"Turbo 'fast'.*turbo: \"off\""):
                await deltas_of(client, beside, label="sql", drafter="fast")
            own = generation("b", adapters=(Component(broken),), drafting=Drafting(broken))
            with pytest.raises(AdapterFailedError, match=r"could not be loaded$"):
                await deltas_of(client, own, label="both", drafter="both")

    run(scenario())


def test_the_heads_of_a_request_are_resident_under_their_name() -> None:
    async def scenario() -> None:
        async with client_of() as client:
            wanted = generation("a", drafting=Drafting("heads"))
            deltas = await deltas_of(client, wanted, drafter="fast")
            assert tokens_of(deltas) == expected_tokens(wanted)
            assert client.residency["heads"].tier == "device"
            assert client.residency.label("heads") == "fast"

    run(scenario())


def test_a_full_queue_refuses_at_once_with_a_time_to_come_back() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01), max_queue=2) as client:
            streams = [client.generate([generation(name, 1000)]) for name in "ab"]
            with pytest.raises(QueueFullError) as refusal:
                client.generate([generation("c")])
            assert refusal.value.retry_after is not None
            assert 1 <= refusal.value.retry_after <= 60
            streams[0].close()
            assert await deltas_of(client, generation("d"))

    run(scenario())


@pytest.mark.parametrize("way", ["close", "stop"])
def test_leaving_a_stream_cancels_it_in_the_engine(way: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.005, journal=journal)) as client:
            stream = client.generate([generation("a", 100_000)])
            await next_of(stream)
            if way == "close":
                stream.close()
            else:
                stream.stop(0)
            assert client.in_flight == 0
            await until(lambda: len(entries(journal, "Cancel")) == 1)
        assert entries(journal, "Cancel")[0]["request_id"] == "a"

    run(scenario())


def test_leaving_a_finished_stream_sends_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(journal=journal)) as client:
            stream = client.generate([generation("a")])
            await rest_of(stream)
            stream.close()
            await deltas_of(client, generation("b"))
        assert entries(journal, "Cancel") == []

    run(scenario())


def test_before_the_start_requests_are_refused_as_unavailable() -> None:
    async def scenario() -> None:
        client = make_client()
        assert client.state == "starting"
        with pytest.raises(UnavailableError, match="starting") as refusal:
            client.generate([generation("a")])
        assert refusal.value.retry_after
        await client.close(0)

    run(scenario())


def test_a_drain_lets_running_requests_end_and_admits_none() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(step_seconds=0.01))
        await client.start()
        running = asyncio.create_task(deltas_of(client, generation("a", 20)))
        await asyncio.sleep(0.03)
        closing = asyncio.create_task(client.close(drain_seconds=20))
        await asyncio.sleep(0)
        assert client.state == "draining"
        with pytest.raises(UnavailableError, match="shutting down"):
            client.generate([generation("b")])
        assert len(await running) == 20
        await closing
        assert client.pid is None

    run(scenario())


def test_a_drain_cuts_what_runs_past_its_deadline() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(step_seconds=0.01))
        await client.start()
        running = asyncio.create_task(deltas_of(client, generation("a", 100_000)))
        await asyncio.sleep(0.03)
        await client.close(drain_seconds=0.1)
        with pytest.raises(UnavailableError, match="shutting down"):
            await running

    run(scenario())


def test_an_engine_that_refuses_to_start_raises_its_own_words() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(refusal="no such folder: /models/none"))
        with pytest.raises(EngineFailedError, match=r"no such folder: /models/none.*model"):
            await client.start()
        assert client.state == "failed"
        with pytest.raises(UnavailableError, match="no such folder"):
            client.generate([generation("a")])
        await client.close(0)

    run(scenario())


def test_an_engine_that_dies_at_the_start_says_how() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(exit_at_start=7))
        with pytest.raises(EngineFailedError, match="exit code 7"):
            await client.start()
        await client.close(0)

    run(scenario())


def test_an_engine_that_hangs_at_the_start_is_given_up() -> None:
    async def scenario() -> None:
        settings = make_settings(engine_start_seconds=0.5)
        main = partial(fake_engine.main, behaviour=Behaviour(start_seconds=600))
        client = EngineClient(settings, Metrics(settings), partial(LocalEngines, main=main))
        with pytest.raises(EngineFailedError, match=r"not ready after 0\.5 seconds"):
            await client.start()
        assert client.pid is None
        await client.close(0)

    run(scenario())


def test_a_deaf_engine_stalls_neither_the_loop_nor_the_end() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(deaf=True)) as client:
            long = tuple(range(300_000))  # more than the pipe holds
            started = time.monotonic()
            stream = client.generate([Submit("a", long, SamplingParams(max_tokens=1), seed=1)])
            await asyncio.sleep(0.05)
            assert time.monotonic() - started < 60  # a write that waits would wait for ever
            stream.close()

    run(scenario())


def test_a_request_id_in_flight_is_not_taken_twice() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01)) as client:
            stream = client.generate([generation("a", 1000)])
            with pytest.raises(ValueError, match="already in flight"):
                client.generate([generation("a")])
            stream.close()

    run(scenario())


def test_residency_follows_the_engine_and_pins() -> None:
    async def scenario() -> None:
        async with client_of() as client:
            client.prefetch("d1", "device")
            await until(lambda: "d1" in client.residency)
            assert client.residency["d1"].tier == "device"
            assert client.residency["d1"].bytes == fake_engine.ADAPTER_BYTES
            assert not client.residency["d1"].pinned
            client.pin("d1", True)
            assert client.residency["d1"].pinned
            client.forget("d1")
            await until(lambda: "d1" not in client.residency)

    run(scenario())


def test_the_servers_own_modules_load_no_torch() -> None:
    code = (
        "import sys, quickchange_server.entrypoints.app; "
        "assert 'quickchange_server.engine_client.client' in sys.modules; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


def submits(count: int, max_tokens: int = 3) -> list[Submit]:
    return [generation(f"r-{index}", max_tokens) for index in range(count)]


def test_each_sequence_that_ends_makes_way_for_the_next_of_its_request() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.001), max_queue=4) as client:
            stream, ended = client.generate(submits(23)), 0
            while ended < 23:
                assert client.in_flight <= 2
                _, delta = await stream.receive()
                assert isinstance(delta, Delta)
                ended += delta.finish_reason is not None
            assert client.in_flight == 0

    run(scenario())


def test_what_waits_for_its_turn_ends_with_its_stream() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01), max_queue=4) as client:
            stream = client.generate(submits(9, max_tokens=500))
            await stream.receive()
            stream.close()
            assert client.in_flight == 0

    run(scenario())


def test_what_waits_for_its_turn_fails_with_the_server() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(step_seconds=0.01), max_queue=4)
        await client.start()
        stream = client.generate(submits(9, max_tokens=500))
        await client.close(drain_seconds=0)
        failed = set()
        while len(failed) < 9:
            index, said = await stream.receive()
            if isinstance(said, UnavailableError):
                failed.add(index)

    run(scenario())
