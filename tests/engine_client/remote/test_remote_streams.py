"""Streams over replicas that die, drain, stall and refuse, at any point."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from client_support import deltas_of, generation, make_settings, next_of, rest_of, run, tokens_of
from client_support import until as until_true
from fake_engine import embedding_of, expected_tokens, prompt_logprobs_of
from fake_replicas import FakeReplicas, Fate, cluster_client, hurried, joined
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.remote import sequence_run
from quickchange_server.errors import (
    EngineFailedError,
    QueueFullError,
    RequestFailedError,
    UnavailableError,
)
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Component, Delta, SamplingParams, Submit

FOREVER = 1000  # losses that a sequence may be present at


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    found = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in found if labels.items() <= s.labels.items())


def check_whole(wanted: Submit, deltas: list[Delta]) -> None:
    """The deltas are those of an undisturbed run, as far as a reader can tell."""
    assert {delta.request_id for delta in deltas} == {wanted.request_id}
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert sum(delta.cached_tokens is not None for delta in deltas) == 1
    assert sum(delta.queue_seconds is not None for delta in deltas) == 1
    if wanted.pooling is not None or not wanted.sampling.max_tokens:
        assert len(deltas) == 1
        return
    tokens, stops = expected_tokens(wanted), wanted.sampling.stop_token_ids
    assert tokens_of(deltas) == tokens
    assert deltas[-1].finish_reason == ("stop" if tokens[-1] in stops else "length")
    if wanted.sampling.logprobs is not None:
        assert [row.token_id for delta in deltas for row in delta.logprobs] == tokens
    told = [row for delta in deltas for row in delta.prompt_logprobs]
    assert told == list(prompt_logprobs_of(wanted))


fates = st.builds(
    Fate, st.sampled_from(["loss", "kill", "give back", "early end", "stall"]), st.integers(0, 6)
)


@st.composite
def sequences(draw: st.DrawFn, name: str) -> Submit:
    stops = draw(st.sets(st.integers(ord("a"), ord("z")), max_size=3))
    sampling = SamplingParams(
        max_tokens=draw(st.integers(0, 24)),
        stop_token_ids=stops,
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, 1])),
    )
    return Submit(
        name,
        (1, 2, 3),
        sampling,
        draw(st.sampled_from([(), (Component("a"),), (Component("a"), Component("b", 0.5))])),
        pooling=draw(st.sampled_from([None, None, None, "mean"])),
        seed=draw(st.integers(0, 1 << 20)),
    )


@dataclass
class Case:
    wanted: list[Submit]
    fates: dict[str, list[Fate]]
    leaves: dict[str, int] = field(default_factory=dict)  # deltas after which its reader goes


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = [f"r{i}" for i in range(draw(st.integers(1, 5)))]
    return Case(
        [draw(sequences(name)) for name in names],
        {name: draw(st.lists(fates, max_size=6)) for name in names},
        {name: draw(st.integers(0, 4)) for name in names if draw(st.booleans())},
    )


async def read(client: EngineClient, wanted: Submit, leaves: int | None) -> list[Delta]:
    stream = client.generate([wanted], label="a")
    deltas: list[Delta] = []
    while not deltas or deltas[-1].finish_reason is None:
        if len(deltas) == leaves:
            stream.close()
            return deltas
        deltas.append(await next_of(stream))
    return deltas


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_whatever_befalls_replicas_each_reader_gets_its_text_once_and_whole(case: Case) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.fates.update({name: deque(some) for name, some in case.fates.items()})
        async with cluster_client(calls, max_request_deaths=FOREVER) as client:
            texts = await asyncio.gather(
                *(read(client, w, case.leaves.get(w.request_id)) for w in case.wanted)
            )
            assert client.in_flight == 0
            await until_true(lambda: not calls.running)
        for wanted, deltas in zip(case.wanted, texts, strict=True):
            if deltas and deltas[-1].finish_reason is not None:
                check_whole(wanted, deltas)
            else:
                assert len(deltas) == case.leaves[wanted.request_id]
                tokens = tokens_of(deltas)
                assert not wanted.sampling.max_tokens or (
                    tokens == expected_tokens(wanted)[: len(tokens)]
                )
        for attempts in joined(calls.submits).values():
            said = [attempt.output for attempt in attempts]
            assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(said))

    run(scenario())


def test_kills_of_replicas_with_many_streams_lose_and_double_nothing() -> None:
    async def scenario() -> None:
        metrics = Metrics(make_settings())
        calls = FakeReplicas(4)
        calls.pace_seconds = 0.001
        async with cluster_client(calls, metrics, max_request_deaths=FOREVER) as client:
            wanted = [generation(f"r{i:02}", 100 + i) for i in range(32)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in wanted]
            for replica in calls.replicas[:3]:
                seen = len(calls.submits)
                await asyncio.sleep(0.02)
                replica.state = "dead"
                await until_true(lambda seen=seen: len(calls.submits) > seen)  # type: ignore[misc]
            for w, deltas in zip(wanted, await asyncio.gather(*streams), strict=True):
                check_whole(w, deltas)
        resubmitted = len(calls.submits) - len(wanted)
        assert resubmitted >= 3
        assert sample(metrics, "quickchange_requests_resubmitted_total") == resubmitted

    run(scenario())


def test_a_lost_sequence_goes_on_at_once_with_what_it_has_said() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        wanted = generation("a", 40)
        calls.fates["a"].append(Fate("loss", 5))
        async with cluster_client(calls) as client:
            deltas = await deltas_of(client, wanted)
        check_whole(wanted, deltas)
        first, second = calls.submits
        assert (first.output, first.request_id) == ((), "a")
        assert second == replace(wanted, request_id="a/2", output=second.output)
        assert 0 < len(second.output) < 40

    run(scenario())


def test_a_submission_that_brings_output_goes_on_behind_it() -> None:
    """A replica gets output with a submission, and its own engine may be lost too."""

    async def scenario() -> None:
        calls = FakeReplicas()
        whole = generation("a", 40)
        said = tuple(expected_tokens(whole)[:7])
        calls.fates["a"].append(Fate("loss", 5))
        async with cluster_client(calls) as client:
            deltas = await deltas_of(client, replace(whole, output=said))
        assert [*said, *tokens_of(deltas)] == expected_tokens(whole)
        assert calls.submits[0].output == said
        assert calls.submits[1].output[:7] == said

    run(scenario())


@pytest.mark.parametrize("kept", range(0, 41, 8))
def test_a_sequence_whose_last_delta_alone_was_lost_ends_without_another_token(kept: int) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        wanted = generation(f"k{kept}", 40)
        calls.fates[wanted.request_id].append(Fate("early end", 1000))
        async with cluster_client(calls) as client:
            check_whole(wanted, await deltas_of(client, wanted))

    run(scenario())


def test_an_embedding_that_is_lost_is_asked_for_whole_again() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        wanted = Submit("e", (1, 2), SamplingParams(max_tokens=0), pooling="mean", seed=0)
        calls.fates["e"].extend([Fate("loss", 0), Fate("give back", 0)])
        async with cluster_client(calls) as client:
            (delta,) = await deltas_of(client, wanted)
        assert delta.embedding is not None
        assert len(delta.embedding) == 4 * len(embedding_of((1, 2), "mean"))
        assert [submit.output for submit in calls.submits] == [(), (), ()]

    run(scenario())


def test_a_sequence_that_is_present_at_too_many_losses_fails_alone() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.pace_seconds = 0.001
        calls.fates["bad"].extend([Fate("loss", 0)] * 9)
        async with cluster_client(calls, max_request_deaths=4) as client:
            wanted = generation("good", 60)
            stream = asyncio.create_task(deltas_of(client, wanted))
            with pytest.raises(RequestFailedError, match=r"4 engine replicas were lost .*killed"):
                await deltas_of(client, generation("bad"))
            check_whole(wanted, await stream)
            assert client.in_flight == 0
        assert len(joined(calls.submits)["bad"]) == 4

    run(scenario())


def test_the_innocent_on_the_replicas_that_one_sequence_ends_are_not_blamed() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(2)
        calls.pace_seconds = 0.001
        calls.fates["bad"].extend([Fate("kill", 0)] * 9)
        async with cluster_client(calls, max_request_deaths=3) as client:
            wanted = [generation(f"r{i}", 80) for i in range(12)]
            streams = [asyncio.create_task(deltas_of(client, w)) for w in wanted]
            with pytest.raises(RequestFailedError):
                await deltas_of(client, generation("bad"))
            for w, deltas in zip(wanted, await asyncio.gather(*streams), strict=True):
                check_whole(w, deltas)
        assert len(joined(calls.submits)["bad"]) == 3

    run(scenario())


def test_what_draining_replicas_give_back_is_never_blamed() -> None:
    async def scenario() -> None:
        metrics = Metrics(make_settings())
        calls = FakeReplicas()
        calls.fates["a"].extend([Fate("give back", 0)] * 20)
        async with cluster_client(calls, metrics, max_request_deaths=1) as client:
            wanted = generation("a")
            check_whole(wanted, await deltas_of(client, wanted))
        assert len(calls.submits) == 21

    run(scenario())


def test_losses_before_a_sequence_got_on_count_no_more() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.fates["a"].extend([Fate("loss", 4)] * 8)  # each past enough tokens
        async with cluster_client(calls, max_request_deaths=1) as client:
            wanted = generation("a", 200)
            check_whole(wanted, await deltas_of(client, wanted))
        assert len(calls.submits) == 9

    run(scenario())


def test_a_refusal_of_the_replica_ends_the_sequence_as_that_error() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.fates["a"].append(Fate("refusal", 0))
        async with cluster_client(calls) as client:
            with pytest.raises(QueueFullError, match="the replica is full") as refusal:
                await deltas_of(client, generation("a"))
            assert refusal.value.retry_after == 3.0
            assert client.in_flight == 0
        assert len(calls.submits) == 1

    run(scenario())


def test_a_fault_of_the_transport_ends_its_sequence_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.fates["a"].append(Fate("bug", 2))
        async with cluster_client(calls) as client:
            other = generation("b", 30)
            beside = asyncio.create_task(deltas_of(client, other))
            with pytest.raises(EngineFailedError, match="a fault of the transport"):
                await deltas_of(client, generation("a", 30))
            check_whole(other, await beside)

    run(scenario())
    assert "request a failed" in caplog.text


@pytest.mark.parametrize("way", ["close", "stop"])
def test_a_reader_that_leaves_frees_the_replicas_work(way: str) -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.pace_seconds = 0.001
        async with cluster_client(calls) as client:
            stream = client.generate([generation("a", 100_000)])
            await next_of(stream)
            assert calls.running
            if way == "close":
                stream.close()
            else:
                stream.stop(0)
            assert client.in_flight == 0
            await until_true(lambda: not calls.running)
            assert calls.left == ["a"]
            again = generation("a", 3)  # the same id, at once
            check_whole(again, await deltas_of(client, again))

    run(scenario())


def test_an_id_in_flight_is_not_taken_twice() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.pace_seconds = 0.001
        async with cluster_client(calls) as client:
            stream = client.generate([generation("a", 1000)])
            with pytest.raises(ValueError, match="already in flight"):
                client.generate([generation("a")])
            stream.close()

    run(scenario())


def test_while_no_replica_serves_requests_wait_and_then_run() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(1)
        calls.pace_seconds = 0.001
        async with cluster_client(calls) as client:
            wanted = [generation("a", 50), generation("b", 5)]
            stream = client.generate(wanted[:1])
            early = [await next_of(stream)]
            calls.replicas[0].state = "dead"
            await until_true(lambda: client.state == "restarting")
            late = asyncio.create_task(deltas_of(client, wanted[1]))
            seen = len(calls.submits)
            await asyncio.sleep(0.05)
            assert len(calls.submits) == seen
            assert client.in_flight == 2
            calls.replicas[0].state = "ready"
            check_whole(wanted[0], early + await rest_of(stream))
            check_whole(wanted[1], await late)
            assert client.state == "ready"

    run(scenario())


def test_where_no_replica_comes_requests_fail_as_unavailable_with_a_time_to_come_back() -> None:
    async def scenario() -> None:
        calls = FakeReplicas(1)
        calls.pace_seconds = 0.001
        async with cluster_client(calls) as client:
            stream = asyncio.create_task(deltas_of(client, generation("a", 1000)))
            await until_true(lambda: bool(calls.running))
            calls.replicas[0].state = "dead"
            with pytest.raises(UnavailableError, match="no engine replica") as failure:
                await stream
            assert failure.value.retry_after
            await until_true(lambda: client.state == "failed")
            with pytest.raises(UnavailableError, match="no engine replica") as refusal:
                client.generate([generation("b")])
            assert refusal.value.retry_after
            calls.replicas[0].state = "ready"
            await until_true(lambda: client.state == "ready")
            wanted = generation("c")
            check_whole(wanted, await deltas_of(client, wanted))

    run(scenario())


def test_replicas_that_are_said_to_serve_and_do_not_end_a_request_in_time() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.fates["a"].extend([Fate("give back", 0)] * 10_000)
        async with cluster_client(calls) as client:
            with pytest.raises(UnavailableError, match="no engine replica"):
                await deltas_of(client, generation("a"))
        assert 5 < len(calls.submits) < 500, "it neither gives up at once nor spins"

    run(scenario())


def test_the_end_of_the_server_cuts_off_what_still_runs() -> None:
    async def scenario() -> None:
        calls = FakeReplicas()
        calls.pace_seconds = 0.001
        async with cluster_client(calls, max_queue=4) as client:
            stream = client.generate([generation(f"r-{i}", 100_000) for i in range(9)])
            await next_of(stream)
            await client.close(drain_seconds=0)
            assert client.state == "draining"
            failed = set()
            while len(failed) < 9:
                index, said = await stream.receive()
                if isinstance(said, UnavailableError):
                    failed.add(index)
            assert client.in_flight == 0

    run(scenario())


def test_pauses_before_further_attempts_grow_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_run, "FIRST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(sequence_run, "LAST_PAUSE_SECONDS", 4.0)
    assert [sequence_run.pause(misses) for misses in range(8)] == [0, 0, 0.5, 1, 2, 4, 4, 4]
    assert sequence_run.pause(5000) == 4


def test_a_pause_in_a_stream_is_told_with_its_reason() -> None:
    async def scenario() -> None:
        told: list[tuple[str, float]] = []

        class Watched(Metrics):
            def resumed(self, reason: str, pause_seconds: float) -> None:
                told.append((reason, pause_seconds))

        calls = FakeReplicas()
        calls.fates["a"].extend([Fate("loss", 3), Fate("give back", 2), Fate("stall", 1)])
        async with cluster_client(calls, Watched(make_settings())) as client:
            await deltas_of(client, generation("a", 60))
        assert [reason for reason, _ in told] == ["lost", "drained"]
        assert all(0 <= pause < 5 for _, pause in told)

    run(scenario())
