"""Engines that are killed, that crash by a request, and that can't be had any more."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
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

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.local import supervisor
from quickchange_server.engine_client.local.channel import Death
from quickchange_server.engine_client.local.supervisor import Supervisor
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
        # The first, the next, and the one for trials, twice: the second trial is the third death.
        assert len(entries(journal, "Start")) == 4

    run(scenario())


class Paced:
    """One stream, and the longest pause in it that its reader sees, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.tokens: list[int] = []

    async def read(self, client: EngineClient, wanted: Submit) -> None:
        stream = client.generate([wanted])
        ended, last = False, time.monotonic()
        while not ended:
            delta = await next_of(stream)
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            last = now
            self.tokens += delta.token_ids
            ended = delta.finish_reason is not None


def test_twenty_streams_stall_once_for_about_a_start_while_two_requests_end_engines(
    tmp_path: Path,
) -> None:
    start, journal = 1.0, tmp_path / "journal"
    behaviour = Behaviour(step_seconds=0.02, start_seconds=start, poison=POISON, journal=journal)

    async def scenario() -> None:
        async with client_of(behaviour) as client:
            innocents = [generation(f"r{i:02}", 300) for i in range(20)]
            streams = [Paced() for _ in innocents]
            reading = [
                asyncio.create_task(one.read(client, w))
                for one, w in zip(streams, innocents, strict=True)
            ]
            await until(lambda: all(len(one.tokens) > 10 for one in streams))
            culprits = [
                asyncio.create_task(deltas_of(client, replace(poison(f"p{i}"), prompt=(POISON, i))))
                for i in range(2)
            ]
            failures = await asyncio.gather(*culprits, return_exceptions=True)
            assert all(isinstance(failure, RequestFailedError) for failure in failures)
            await asyncio.gather(*reading)
        for w, one in zip(innocents, streams, strict=True):
            assert one.tokens == expected_tokens(w)
            assert one.longest < 4 * start  # on a quiet machine 1.2 s
        again = [e["pid"] for e in entries(journal, "Submit") if str(e["request_id"])[0] == "r"][
            20:
        ]
        assert len(again) == 20, "each was submitted twice, before and after its one stall"
        assert len(set(again)) == 1
        # Two that served, and those for trials: either request dies in two.
        assert len(entries(journal, "Start")) == 2 + 4

    run(scenario())


def test_what_ended_engines_is_refused_at_once_when_it_is_sent_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        metrics = Metrics(make_settings())
        async with client_of(Behaviour(poison=POISON, journal=journal), metrics) as client:
            with pytest.raises(RequestFailedError):
                await deltas_of(client, poison())
            starts = len(entries(journal, "Start"))
            again = replace(poison("again"), seed=77)
            with pytest.raises(RequestFailedError, match="10 minutes"):
                client.generate([again])
            assert len(entries(journal, "Start")) == starts
            other = generation("other")
            assert tokens_of(await deltas_of(client, other)) == expected_tokens(other)
        assert 'requests_rejected_total{reason="given_up"} 1' in metrics.render()[0].decode()

    run(scenario())


def test_the_choices_of_a_request_that_ends_engines_fail_together(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        async with client_of(Behaviour(poison=POISON, journal=journal)) as client:
            choices = [replace(poison(f"p/{i}"), seed=i) for i in range(8)]
            stream = client.generate(choices)
            for _ in choices:
                _, said = await stream.receive()
                assert isinstance(said, RequestFailedError)
        assert len(entries(journal, "Start")) == 4

    run(scenario())


def test_where_no_engine_for_trials_can_be_had_suspects_are_tried_between_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "quickchange_server.engine_client.local.local_engines.has_room",
        lambda *_: False,
        raising=True,
    )
    journal = tmp_path / "journal"
    behaviour = Behaviour(step_seconds=0.002, poison=POISON, journal=journal)

    async def scenario() -> None:
        async with client_of(behaviour) as client:
            innocents = [generation(f"r{i}", 40) for i in range(5)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in innocents]
            await asyncio.sleep(0.05)
            with pytest.raises(RequestFailedError):
                await deltas_of(client, poison())
            for w, deltas in zip(innocents, await asyncio.gather(*streams), strict=True):
                assert tokens_of(deltas) == expected_tokens(w)
        assert len(entries(journal, "Start")) == 4

    run(scenario())


def test_an_engine_that_hangs_is_replaced_and_its_streams_go_on() -> None:
    async def scenario() -> None:
        behaviour = Behaviour(step_seconds=0.01)
        async with client_of(behaviour, engine_stall_seconds=0.4) as client:
            wanted = [generation(f"r{i}", 60) for i in range(4)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in wanted]
            await asyncio.sleep(0.15)
            hung = client.pid
            assert hung is not None
            os.kill(hung, signal.SIGSTOP)
            for w, deltas in zip(wanted, await asyncio.gather(*streams), strict=True):
                assert tokens_of(deltas) == expected_tokens(w)
            assert client.pid != hung

    run(scenario())


def test_an_idle_engine_that_hangs_is_replaced() -> None:
    async def scenario() -> None:
        async with client_of(engine_stall_seconds=0.4) as client:
            hung = client.pid
            assert hung is not None
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: client.pid not in (None, hung) and client.state == "ready")

    run(scenario())


def test_a_request_that_hangs_engines_fails_alone() -> None:
    async def scenario() -> None:
        behaviour = Behaviour(step_seconds=0.005, sleeper=POISON)
        async with client_of(behaviour, engine_stall_seconds=0.3) as client:
            innocent = generation("good", 40)
            stream = asyncio.create_task(deltas_of(client, innocent))
            with pytest.raises(RequestFailedError, match=r"did not answer for 0\.3 seconds"):
                await deltas_of(client, poison())
            assert tokens_of(await stream) == expected_tokens(innocent)

    run(scenario())


def test_an_engine_at_a_long_step_or_idle_is_left_alone() -> None:
    async def scenario() -> None:
        async with client_of(Behaviour(step_seconds=0.5), engine_stall_seconds=1.0) as client:
            first = client.pid
            await deltas_of(client, generation("a", 3))
            await asyncio.sleep(1.5)
            assert client.pid == first

    run(scenario())


def test_an_engine_is_left_alone_for_ten_of_its_longest_steps() -> None:
    async def scenario() -> None:
        behaviour = Behaviour(step_seconds=1.0, prices=((1, 0.1), (64, 0.3)))
        async with client_of(behaviour, engine_stall_seconds=0.3) as client:
            first = client.pid
            await deltas_of(client, generation("a", 2))
            assert client.pid == first

    run(scenario())


def test_a_stall_limit_of_0_watches_nothing() -> None:
    async def scenario() -> None:
        async with client_of(engine_stall_seconds=0) as client:
            stopped = client.pid
            assert stopped is not None
            os.kill(stopped, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            assert client.pid == stopped
            os.kill(stopped, signal.SIGCONT)

    run(scenario())


def test_time_in_which_the_server_itself_was_stopped_is_not_held_against_the_engine() -> None:
    async def scenario() -> None:
        async with client_of(engine_stall_seconds=0.4) as client:
            first = client.pid
            await asyncio.sleep(0.2)
            time.sleep(2.0)  # the event loop, as if the whole machine had slept
            await asyncio.sleep(0.2)
            assert client.pid == first

    run(scenario())


def test_the_next_engine_gets_the_prices_that_the_last_one_measured(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        behaviour = Behaviour(prices=((1, 0.1), (64, 0.3)), journal=journal)
        async with client_of(behaviour) as client:
            await deltas_of(client, generation("a"))
            kill_engine(client)
            await until(lambda: client.state == "restarting")
            await deltas_of(client, generation("b"))
        begins = [entry["prices"] for entry in entries(journal, "Begin")]
        assert begins == [[], [[1, 0.1], [64, 0.3]]]

    run(scenario())


def test_a_server_whose_engines_fail_refuses_with_a_true_time_and_heals_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 3)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_SECONDS", 0.2)
    journal, broken = tmp_path / "journal", tmp_path / "broken"

    async def scenario() -> None:
        behaviour = Behaviour(step_seconds=0.01, broken=broken, journal=journal)
        async with client_of(behaviour) as client:
            stream = asyncio.create_task(deltas_of(client, generation("a", 100_000)))
            await asyncio.sleep(0.05)
            broken.touch()
            kill_engine(client)
            with pytest.raises(EngineFailedError, match=r"failed 3 times in a row.*exit code 4"):
                await stream
            assert client.state == "failed"
            with pytest.raises(UnavailableError, match="has failed") as refusal:
                client.generate([generation("b")])
            assert refusal.value.retry_after is not None
            assert 1 <= refusal.value.retry_after < 5
            broken.unlink()
            await until(lambda: client.state == "ready")
            wanted = generation("c")
            assert tokens_of(await deltas_of(client, wanted)) == expected_tokens(wanted)

    run(scenario())


def test_pauses_between_starts_grow_to_a_bound_and_no_further() -> None:
    async def scenario() -> None:
        watch = Supervisor(make_settings(), fake_engine.main, Listener())
        pauses = []
        for failures in (0, 1, 2, 5, 8, 20, 5000):
            watch._failures = failures
            pauses.append(watch._backoff_seconds())
        assert pauses == [0, 0.5, 1, 8, 60, 60, 60]

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
