"""Engines that are killed, that crash by a request, and that can't be had any more."""

from __future__ import annotations

import asyncio
import os
import signal
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
    run,
    tokens_of,
    until,
)
from fake_engine import Behaviour, entries, expected_tokens
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.engine_client import supervisor
from quickchange_server.engine_client.channel import Death
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.supervisor import Supervisor
from quickchange_server.errors import EngineFailedError, RequestFailedError, UnavailableError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import (
    AdapterMoved,
    Component,
    Delta,
    Drafting,
    Forget,
    Prefetch,
    Ready,
    Report,
    SamplingParams,
    Submit,
)

POISON = 666


def kill_engine(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


def sample(metrics: Metrics, name: str) -> float:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return sum(s.value for family in families for s in family.samples if s.name == name)


def poison(name: str = "poison") -> Submit:
    return Submit(name, (POISON, 1), SamplingParams(max_tokens=50), seed=5)


def test_streams_go_on_with_the_same_tokens_when_the_engine_is_killed() -> None:
    async def scenario() -> None:
        metrics = Metrics(make_settings())
        async with client_of(Behaviour(step_seconds=0.01), metrics) as client:
            wanted = [generation(f"r{i}", 30 + i, adapters=(Component(f"d{i}"),)) for i in range(6)]
            streams = [
                asyncio.create_task(deltas_of(client, w, label=f"a{i}"))
                for i, w in enumerate(wanted)
            ]
            await asyncio.sleep(0.12)
            first = client.pid
            kill_engine(client)
            await until(lambda: client.state == "restarting")
            results = await asyncio.gather(*streams)
            assert client.pid != first
        for w, deltas in zip(wanted, results, strict=True):
            assert tokens_of(deltas) == expected_tokens(w)
            assert deltas[-1].finish_reason == "length"
            assert {delta.request_id for delta in deltas} == {w.request_id}
        assert sample(metrics, "quickchange_engine_restarts_total") == 1
        assert sample(metrics, "quickchange_requests_resubmitted_total") == 6

    run(scenario())


def test_logprobs_and_first_words_come_once_over_a_restart() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01)) as client:
            sampling = SamplingParams(max_tokens=30, logprobs=1)
            wanted = Submit("a", (1, 2), sampling, seed=3)
            stream = asyncio.create_task(deltas_of(client, wanted))
            await asyncio.sleep(0.12)
            kill_engine(client)
            deltas = await stream
        assert [p.token_id for d in deltas for p in d.logprobs] == tokens_of(deltas)
        assert sum(d.cached_tokens is not None for d in deltas) == 1
        assert sum(d.queue_seconds is not None for d in deltas) == 1

    run(scenario())


def test_drafting_goes_on_with_the_same_tokens_when_the_engine_is_killed(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01, journal=journal)) as client:
            sampling = SamplingParams(max_tokens=100, logprobs=1)
            drafting = Drafting("heads", lookup=True)
            wanted = Submit("a", (1, 2), sampling, drafting=drafting, seed=3)
            stream = asyncio.create_task(deltas_of(client, wanted, drafter="turbo"))
            await asyncio.sleep(0.12)
            kill_engine(client)
            deltas = await stream
        assert tokens_of(deltas) == expected_tokens(wanted)
        assert [p.token_id for d in deltas for p in d.logprobs] == tokens_of(deltas)
        submits = entries(journal, "Submit")
        assert [entry["heads"] for entry in submits] == ["heads", "heads"]
        resumed_at = submits[1]["output"]
        assert isinstance(resumed_at, int)
        assert 0 < resumed_at < 100
        assert len(deltas) < 100

    run(scenario())


def test_a_request_admitted_during_a_restart_waits_for_the_new_engine() -> None:
    async def scenario() -> None:
        async with client_of() as client:
            kill_engine(client)
            await until(lambda: client.state == "restarting")
            wanted = generation("late")
            assert tokens_of(await deltas_of(client, wanted)) == expected_tokens(wanted)

    run(scenario())


def test_a_reader_that_leaves_during_a_restart_is_not_submitted_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.005, journal=journal)) as client:
            stream = client.generate([generation("gone", 100_000)])
            await next_of(stream)
            kill_engine(client)
            await until(lambda: client.state == "restarting")
            stream.close()
            await deltas_of(client, generation("next"))
        submitted = [entry["request_id"] for entry in entries(journal, "Submit")]
        assert submitted == ["gone", "next"]

    run(scenario())


def test_pins_and_waiting_prefetches_reach_the_new_engine(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(journal=journal)) as client:
            client.pin("kept", True)
            client.pin("let-go", True)
            client.pin("let-go", False)
            await until(lambda: len(client.residency) == 2)
            kill_engine(client)
            await until(lambda: client.state == "restarting")
            assert len(client.residency) == 0
            client.prefetch("soon", "device")
            await until(lambda: set(client.residency) == {"kept", "soon"})
            assert client.residency["kept"].pinned

    run(scenario())


@pytest.mark.parametrize("poison_at", [0, 12])
def test_a_request_that_ends_engines_fails_alone_and_the_others_complete(
    poison_at: int, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(step_seconds=0.002, poison=POISON, poison_at=poison_at, journal=journal)

    async def scenario() -> None:
        async with client_of(behaviour) as client:
            innocents = [generation(f"r{i}", 40) for i in range(5)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in innocents]
            culprit = asyncio.create_task(deltas_of(client, poison()))
            with pytest.raises(RequestFailedError, match="exit code 3") as failure:
                await culprit
            assert failure.value.status == 424
            for w, deltas in zip(innocents, await asyncio.gather(*streams), strict=True):
                assert tokens_of(deltas) == expected_tokens(w)
            assert client.state == "ready"
        assert len(entries(journal, "Start")) == 4  # one death alone, after two in company

    run(scenario())


def test_two_poisons_and_many_innocents_all_get_what_they_deserve() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.001, poison=POISON, poison_at=3)) as client:
            innocents = [generation(f"r{i}", 60) for i in range(8)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in innocents]
            culprits = [asyncio.create_task(deltas_of(client, poison(f"p{i}"))) for i in range(2)]
            for failure in await asyncio.gather(*culprits, return_exceptions=True):
                assert isinstance(failure, RequestFailedError)
            for w, deltas in zip(innocents, await asyncio.gather(*streams), strict=True):
                assert tokens_of(deltas) == expected_tokens(w)

    run(scenario())


def test_an_engine_that_can_not_be_had_again_fails_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quickchange_server.engine_client.supervisor.MAX_FAILURES", 3)
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01, starts=1, journal=journal)) as client:
            stream = asyncio.create_task(deltas_of(client, generation("a", 100_000)))
            await asyncio.sleep(0.05)
            kill_engine(client)
            with pytest.raises(EngineFailedError, match=r"failed 3 times in a row.*exit code 4"):
                await stream
            assert client.state == "failed"
            with pytest.raises(UnavailableError, match="has failed"):
                client.generate([generation("b")])
        assert len(entries(journal, "Start")) == 4

    run(scenario())


def test_a_drain_outlives_the_death_of_the_engine() -> None:
    async def scenario() -> None:
        client = make_client(Behaviour(step_seconds=0.01))
        await client.start()
        wanted = generation("a", 30)
        stream = asyncio.create_task(deltas_of(client, wanted))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(client.close(drain_seconds=20))
        kill_engine(client)
        assert tokens_of(await stream) == expected_tokens(wanted)
        await closing

    run(scenario())


def test_a_close_ends_an_engine_that_does_not_end_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)

    async def scenario() -> None:
        client = make_client(Behaviour(deaf=True))
        await client.start()
        await asyncio.sleep(0.05)  # it is being watched now
        engine = client.pid
        assert engine is not None
        await client.close(0)
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)

    run(scenario())


def test_a_close_during_a_restart_leaves_no_process(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        client = make_client(Behaviour(start_seconds=0.3, journal=journal))
        await client.start()
        kill_engine(client)
        await until(lambda: len(entries(journal, "Start")) == 2)
        await client.close(0)
        for entry in entries(journal, "Start"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(str(entry["pid"])), 0)

    run(scenario())


def test_signals_to_the_whole_group_do_not_end_the_engine() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.01)) as client:
            wanted = generation("a", 20)
            stream = asyncio.create_task(deltas_of(client, wanted))
            await asyncio.sleep(0.05)
            pid = client.pid
            assert pid is not None
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
            assert len(tokens_of(await stream)) == 20
            assert client.pid == pid

    run(scenario())


class Listener:
    """Notes what a supervisor tells."""

    def __init__(self) -> None:
        self.readies: list[Ready] = []
        self.reports: list[Report] = []
        self.deaths: list[str] = []
        self.failures: list[str] = []

    def engine_ready(self, ready: Ready) -> None:
        self.readies.append(ready)

    def engine_reported(self, report: Report) -> None:
        self.reports.append(report)

    def engine_died(self, death: Death) -> bool:
        self.deaths.append(death.reason)
        return False

    def engine_failed(self, reason: str) -> None:
        self.failures.append(reason)


def test_an_idle_engine_that_keeps_dying_is_given_up_after_backoff() -> None:
    async def scenario() -> None:
        listener = Listener()
        supervisor = Supervisor(
            make_settings(),
            partial(fake_engine.main, behaviour=Behaviour()),
            listener,
            first_backoff_seconds=0.01,
        )
        await supervisor.start()
        while supervisor.phase != "failed":
            if supervisor.phase == "ready" and supervisor.pid is not None:
                os.kill(supervisor.pid, signal.SIGKILL)
                deaths = len(listener.deaths)
                await until(lambda deaths=deaths: len(listener.deaths) > deaths)  # type: ignore[misc]
            await asyncio.sleep(0.005)
        assert len(listener.deaths) == 5
        assert "SIGKILL" in listener.deaths[0]
        assert len(listener.failures) == 1
        await supervisor.stop()

    run(scenario())


def test_an_engine_is_started_once() -> None:
    async def scenario() -> None:
        async with client_of() as client:
            with pytest.raises(RuntimeError, match="started once"):
                await client.start()

    run(scenario())


def test_reports_made_before_a_death_are_not_lost() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(poison=POISON, poison_at=2)) as client:
            stream = client.generate([poison()])
            early: list[Delta] = [await next_of(stream), await next_of(stream)]
            with pytest.raises(RequestFailedError):
                await next_of(stream)
        assert tokens_of(early) == expected_tokens(poison())[:2]

    run(scenario())


def test_moves_of_an_adapter_reach_the_listener_in_order() -> None:
    async def scenario() -> None:
        listener = Listener()
        supervisor = Supervisor(make_settings(), fake_engine.main, listener)
        await supervisor.start()
        supervisor.channel.send(Prefetch("d"))
        supervisor.channel.send(Forget("d"))
        await until(lambda: len(listener.reports) == 2)
        await supervisor.stop()
        moves = [r for r in listener.reports if isinstance(r, AdapterMoved)]
        assert [(m.tier, m.reason) for m in moves] == [("device", "load"), ("disk", "forget")]

    run(scenario())
