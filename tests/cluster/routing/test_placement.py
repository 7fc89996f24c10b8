"""The order of replicas for a request: its ranks, its bound on loads, and how little it moves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendezvous import rendezvous

from quickchange_server.cluster.routing.placement import (
    PlacementPolicy,
    ReplicaCandidate,
    order,
)

POLICY = PlacementPolicy()
DIGESTS = [f"{n:064x}" for n in range(6)]

tiers = st.sampled_from([frozenset(DIGESTS[begin:end]) for begin in range(4) for end in range(7)])
one = st.builds(
    ReplicaCandidate,
    replica=st.integers(0, 30).map("engine-{}".format),
    queue=st.integers(0, 60),
    device=tiers,
    host=tiers,
    full=st.booleans(),
    kv_share=st.sampled_from([0.0, 0.5, 0.96]),
    step_seconds=st.sampled_from([0.0, 0.01, 0.02, 0.2]),
)
candidates = st.lists(one, min_size=1, max_size=8, unique_by=lambda each: each.replica)
wanted = st.lists(st.sampled_from(DIGESTS), unique=True, max_size=3)


@settings(deadline=None, max_examples=50)
@given(candidates, wanted, st.data())
def test_every_replica_has_one_place_and_equal_input_gives_equal_order(
    replicas: list[ReplicaCandidate], digests: list[str], data: st.DataObject
) -> None:
    every = [c.replica for c in replicas]
    avoid = data.draw(st.sets(st.sampled_from(every)))
    prefixes = data.draw(st.dictionaries(st.sampled_from(every), st.integers(0, 512)))
    shuffled = data.draw(st.permutations(replicas))

    found = order(replicas, digests, prefixes=prefixes, avoid=avoid)

    assert sorted(found) == sorted(every)
    assert found == order(shuffled, digests[::-1], prefixes=prefixes, avoid=avoid)


@settings(deadline=None, max_examples=50)
@given(candidates, wanted)
def test_the_first_replica_is_within_its_bound(
    replicas: list[ReplicaCandidate], digests: list[str]
) -> None:
    for replica in replicas:
        replica.step_seconds = replica.kv_share = 0.0
    first = next(c for c in replicas if c.replica == order(replicas, digests)[0])
    mean = sum(c.queue for c in replicas) / len(replicas)
    bound = (1 + POLICY.epsilon) * mean + 1

    holds = digests and first.held(digests, 0.0) == "device"
    assert first.queue <= bound + (POLICY.slack if holds else 0)


@settings(deadline=None, max_examples=50)
@given(candidates, wanted, st.data())
def test_a_lost_request_goes_elsewhere_while_there_is_another_replica(
    replicas: list[ReplicaCandidate], digests: list[str], data: st.DataObject
) -> None:
    lost = data.draw(st.sampled_from([c.replica for c in replicas]))
    first = order(replicas, digests, avoid=[lost])[0]
    assert first != lost or len(replicas) == 1


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20))
def test_a_replica_that_joins_takes_its_part_and_moves_nothing_between_others(
    count: int,
) -> None:
    before = [f"engine-{n}" for n in range(count)]
    keys = [[f"digest-{n}"] for n in range(300)]
    moved = 0
    for key in keys:
        old, new = rendezvous(before, key), rendezvous([*before, "new"], key)
        assert [name for name in new if name != "new"] == old
        moved += new[0] == "new"
    mean = len(keys) / (count + 1)
    assert moved < mean + 5 * mean**0.5


def test_rendezvous_spreads_adapters_evenly() -> None:
    homes = Counter(rendezvous([f"e{n}" for n in range(10)], [str(key)])[0] for key in range(2000))
    assert len(homes) == 10
    assert max(homes.values()) < 1.3 * 200


def _placed(count: int, replicas: list[ReplicaCandidate], digest: str) -> Counter[str]:
    """Where `count` sequences of one adapter go that come one after another and stay."""
    by_name = {c.replica: c for c in replicas}
    placed: Counter[str] = Counter()
    for _ in range(count):
        first = by_name[order(replicas, [digest])[0]]
        first.queue += 1
        first.device = frozenset(first.device) | {digest}
        placed[first.replica] += 1
    return placed


def test_a_hot_adapter_spreads_as_its_queue_grows() -> None:
    spread = [
        len(_placed(count, [ReplicaCandidate(f"e{n}") for n in range(8)], "hot"))
        for count in (1, 4, 16, 64, 256)
    ]
    assert spread[:2] == [1, 1]
    assert spread == sorted(spread)
    assert spread[-1] >= 6  # each has at most a quarter more than the mean, and five


def test_an_adapter_that_cooled_is_at_home_again() -> None:
    replicas = [ReplicaCandidate(f"e{n}") for n in range(8)]
    assert len(_placed(256, replicas, "hot")) > 1
    home = next(
        name
        for name in rendezvous([c.replica for c in replicas], ["hot"])
        if "hot" in {c.replica: c for c in replicas}[name].device
    )
    for replica in replicas:
        replica.queue = 0
    assert order(replicas, ["hot"])[0] == home
    assert set(_placed(5, replicas, "hot")) == {home}


def test_a_cold_adapter_stays_on_the_replica_that_has_it() -> None:
    home, other = rendezvous(["a", "b"], ["x"])
    replicas = [ReplicaCandidate(home, queue=5), ReplicaCandidate(other, device={"x"}, queue=6)]
    assert order(replicas, ["x"])[0] == other


def test_the_host_tier_comes_before_hashing() -> None:
    home, other = rendezvous(["a", "b"], ["x"])
    replicas = [ReplicaCandidate(home), ReplicaCandidate(other, host={"x"})]
    assert order(replicas, ["x"]) == [other, home]


def test_room_at_home_comes_before_a_copy_on_a_host_whose_device_is_full() -> None:
    home, other = rendezvous(["a", "b"], ["x"])
    full = ReplicaCandidate(other, host={"x"}, full=True)
    assert order([ReplicaCandidate(home), full], ["x"]) == [home, other]
    assert order([ReplicaCandidate(home, full=True), full], ["x"]) == [other, home]


def test_all_of_a_composition_must_be_there() -> None:
    replicas = [
        ReplicaCandidate("a", device={"x"}, host={"y"}),
        ReplicaCandidate("b", device={"x", "y"}),
    ]
    assert order(replicas, ["x", "y"])[0] == "b"
    replicas[1].device = frozenset()
    assert order(replicas, ["x", "y"])[0] == "a"


def test_an_adapter_on_its_way_counts_until_its_time_is_over() -> None:
    home, other = rendezvous(["a", "b"], ["x"])
    replicas = [ReplicaCandidate(home), ReplicaCandidate(other, loading={"x": 10.0})]
    assert order(replicas, ["x"], now=9.0)[0] == other
    assert order(replicas, ["x"], now=10.0)[0] == home


@pytest.mark.parametrize("digests", [[], ["x"]])
def test_a_shared_prefix_is_preferred_within_the_bound(digests: list[str]) -> None:
    replicas = [ReplicaCandidate(name, device={"x"}) for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        assert order(replicas, digests, prefixes={name: 64})[0] == name
    assert order(replicas, digests, prefixes={"a": 64, "c": 128})[0] == "c"
    replicas[2].queue = 50
    assert order(replicas, digests, prefixes={"a": 64, "c": 128})[0] == "a"


def test_a_prefix_does_not_move_an_adapter() -> None:
    replicas = [ReplicaCandidate("a", device={"x"}), ReplicaCandidate("b")]
    assert order(replicas, ["x"], prefixes={"b": 4096})[0] == "a"


def test_the_plain_base_goes_to_the_least_loaded() -> None:
    replicas = [
        ReplicaCandidate("a", queue=3),
        ReplicaCandidate("b", queue=2),
        ReplicaCandidate("c", queue=3),
    ]
    assert order(replicas, [])[0] == "b"


def test_a_slower_replica_gets_less() -> None:
    quick, slow = (
        ReplicaCandidate("quick", step_seconds=0.01),
        ReplicaCandidate("slow", step_seconds=0.03),
    )
    by_name = {"quick": quick, "slow": slow}
    for _ in range(100):
        by_name[order([quick, slow], [])[0]].queue += 1
    assert quick.queue == pytest.approx(75, abs=2)


def test_a_replica_without_kv_blocks_comes_last() -> None:
    replicas = [ReplicaCandidate("a", device={"x"}, kv_share=0.99), ReplicaCandidate("b", queue=1)]
    assert order(replicas, ["x"]) == ["b", "a"]
    assert order(replicas, []) == ["b", "a"]


def test_no_replica_is_no_order() -> None:
    assert order([], ["x"]) == []
