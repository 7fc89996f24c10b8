"""Times and tiers of one simulated replica, against ones worked out by hand or step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.cluster.simulation.replica_model import ReplicaModel
from quickchange_server.cluster.simulation.simulated_replica import SimulatedReplica
from quickchange_server.cluster.simulation.simulation import ClusterModel, simulate
from quickchange_server.cluster.simulation.traffic import TracedRequest


def model(**fields: object) -> ReplicaModel:
    """1 s for a step of 1 row, 0.5 s for each more; an adapter loads in 10 s and copies in 1 s."""
    values: dict[str, object] = {
        "prices": ((1, 1.0), (3, 2.0)),
        "adapter_bytes": 10,
        "adapter_device_bytes": 20,
        "adapter_host_bytes": 30,
        "kv_tokens": 1000,
        "max_sequences": 4,
        "max_batch_tokens": 8,
        "store_seconds": 10.0,
        "copy_seconds": 1.0,
    }
    return ReplicaModel(**{**values, **fields})  # type: ignore[arg-type]


def run(replica: SimulatedReplica, *requests: TracedRequest) -> dict[TracedRequest, float]:
    """When each request's first token came."""
    waiting = list(requests)
    replica.finished.clear()
    firsts: dict[TracedRequest, float] = {}
    while True:
        arrival = waiting[0].time if waiting else math.inf
        due = min(replica.ends, replica.loaded)
        if arrival == due == math.inf:
            return firsts
        if arrival <= due:
            replica.submit(waiting.pop(0), arrival)
        elif replica.ends <= replica.loaded:
            replica.step_end()
        else:
            replica.load_end()
        firsts |= {sequence.request: sequence.first for sequence in replica.finished}


def request(time: float, adapter: str = "", prompt: int = 3, output: int = 1) -> TracedRequest:
    return TracedRequest(time, adapter, prompt, output)


def test_a_prompt_is_one_step_and_each_further_token_another() -> None:
    replica = SimulatedReplica(model())
    alone = request(5.0, prompt=3, output=4)
    assert run(replica, alone) == {alone: 7.0}
    assert replica.busy_seconds == 2.0 + 3 * 1.0


def test_a_long_prompt_is_computed_in_chunks() -> None:
    long = request(0.0, prompt=8 + 8 + 1)
    assert run(SimulatedReplica(model()), long) == {long: 4.5 + 4.5 + 1.0}


def test_what_comes_during_a_step_waits_for_its_end() -> None:
    first, second = request(0.0, prompt=1, output=10), request(3.5, prompt=2)
    firsts = run(SimulatedReplica(model()), first, second)
    assert firsts[second] == 4.0 + 2.0  # the step to 4.0, then a step of 1 + 2 rows


def test_a_cold_adapter_is_loaded_once_and_then_there() -> None:
    replica = SimulatedReplica(model())
    requests = [request(0.0, "a"), request(1.0, "a"), request(50.0, "a")]
    firsts = run(replica, *requests)
    assert firsts[requests[0]] == 11.0 + 3.5  # both prompts in one step
    assert firsts[requests[2]] == 50.0 + 2.0
    assert (replica.store_loads, replica.copies) == (1, 1)
    assert replica.held("a") == "device"


def test_the_least_recently_used_adapter_gives_way_and_stays_on_the_host() -> None:
    replica = SimulatedReplica(model())
    run(replica, *(request(100.0 * n, adapter) for n, adapter in enumerate("abac")))
    assert [replica.held(adapter) for adapter in "abc"] == ["device", "host", "device"]
    again = request(1000.0, "b")
    assert run(replica, again) == {again: 1000.0 + 1.0 + 2.0}
    assert replica.store_loads == 3


def test_an_adapter_in_use_is_not_evicted() -> None:
    replica = SimulatedReplica(model(adapter_device_bytes=10))
    long, other = request(0.0, "a", prompt=1, output=100), request(1.0, "b", prompt=1)
    firsts = run(replica, long, other)
    assert firsts[long] == 10.0 + 10.0 + 1.0 + 1.0  # the loads, the copy, the step
    assert firsts[other] == firsts[long] + 99 + 1.0 + 1.0  # its end, the copy, the step


def test_the_host_keeps_within_its_budget() -> None:
    replica = SimulatedReplica(model())
    run(replica, *(request(100.0 * n, f"a{n}") for n in range(9)))
    assert len(replica.host) == 3


def test_adapters_and_context_make_steps_longer() -> None:
    replica = SimulatedReplica(model(adapter_seconds=0.25, context_seconds=0.001))
    run(replica, request(0.0, "a", prompt=3, output=2))
    assert replica.busy_seconds == pytest.approx((2.0 + 0.25) + (1.0 + 0.25 + 3 * 0.001))


def test_a_prefix_is_computed_once() -> None:
    replica = SimulatedReplica(model())
    first, second = (TracedRequest(time, "", 8, 1, "system", 6) for time in (0.0, 20.0))
    assert run(replica, first, second) == {first: 4.5, second: 20.0 + 1.5}


def test_no_more_sequences_run_than_have_room() -> None:
    narrow = SimulatedReplica(model(kv_tokens=10))
    requests = [request(0.0, prompt=5, output=5), request(0.1, prompt=5, output=5)]
    firsts = run(narrow, *requests)
    assert sorted(firsts.values()) == [3.0, 3.0 + 4.0 + 3.0]


requests_of = st.lists(
    st.builds(
        TracedRequest,
        # A grid that sums of steps meet exactly: a tie is one in both, not a matter of rounding.
        time=st.integers(0, 30 * 16).map(lambda sixteenths: sixteenths / 16),
        adapter=st.sampled_from(["", "a", "b", "c", "d"]),
        prompt=st.integers(1, 20),
        output=st.integers(1, 12),
        prefix=st.just(""),
        prefix_tokens=st.just(0),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda each: each.time,  # one that comes to an idle replica starts at once
).map(lambda found: sorted(found, key=lambda each: each.time))


def stepwise(requests: list[TracedRequest], replica: ReplicaModel) -> list[float]:
    """First tokens on one replica without adapters, one step at a time."""
    prices = replica.price_table()
    waiting, running = list(requests), []
    now, firsts = 0.0, []
    while waiting or running:
        if not running:
            now = max(now, waiting[0].time)
        while waiting and waiting[0].time <= now and len(running) < replica.max_sequences:
            taken = waiting.pop(0)
            running.append([taken.time, taken.prompt, taken.output])
        decoding = [each for each in running if not each[1]]
        budget = replica.max_batch_tokens - len(decoding)
        rows, chunks = len(decoding), []
        for each in running:
            if each[1] and (chunk := min(each[1], budget)):
                budget -= chunk
                rows += chunk
                chunks.append((each, chunk))
        now += prices[rows]
        for each, chunk in chunks:
            each[1] -= chunk
            if not each[1]:
                firsts.append(now - each[0])
                each[2] -= 1
        for each in decoding:
            each[2] -= 1
        running = [each for each in running if each[2]]
    return firsts


@settings(deadline=None, max_examples=50)
@given(requests_of)
def test_stretches_of_steps_take_as_long_as_step_by_step(requests: list[TracedRequest]) -> None:
    plain = [each._replace(adapter="") for each in requests]
    outcome = simulate(plain, ClusterModel(replica=model(), replicas=1), "random")
    assert sorted(outcome.first_tokens) == pytest.approx(sorted(stepwise(plain, model())))


@settings(deadline=None, max_examples=50)
@given(requests_of, st.integers(1, 3), st.sampled_from(["affinity", "random", "least-loaded"]))
def test_every_request_is_answered_once_and_nothing_is_held_at_the_end(
    requests: list[TracedRequest], replicas: int, policy: str
) -> None:
    outcome = simulate(requests, ClusterModel(replica=model(), replicas=replicas), policy)  # type: ignore[arg-type]
    assert len(outcome.first_tokens) == sum(outcome.placed) == len(requests)
    assert min(outcome.first_tokens) >= 1.0  # no step is shorter
    assert sum(outcome.held.values()) == sum(bool(each.adapter) for each in requests)
    assert outcome.store_loads <= outcome.copies


@settings(deadline=None, max_examples=50)
@given(requests_of)
def test_a_replica_is_within_its_budgets_and_empty_at_the_end(
    requests: list[TracedRequest],
) -> None:
    replica = SimulatedReplica(model())
    firsts = run(replica, *requests)
    assert len(replica.device) <= 2
    assert len(replica.host) <= 3
    assert replica.queue == 0
    assert replica.kv_share == 0
    assert not any(replica._claims.values())
    assert len(firsts) == len(set(requests))
