"""Adapter tiers: claims, eviction, pins and failures, with a loader that the test lets through."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from residency_bench import LARGE, SLAB, SLABS, Bench, bench

from quickchange_server.adapters.adapter_loader import Pacer
from quickchange_server.protocol import AdapterFailed, AdapterMoved


def test_a_claim_is_ready_when_all_its_adapters_are_on_the_device() -> None:
    with bench() as b:
        b.residency.claim("r", ["l1a", "l2b"])
        assert b.residency.ready("r") is None
        b.settle()
        slots = b.residency.ready("r")
        assert slots is not None
        assert set(slots) == {"l1a", "l2b"}
        assert b.tier("l1a") == b.tier("l2b") == "device"
        assert b.pool.used_bytes == 3 * LARGE


def test_the_weights_are_in_the_arena_when_a_claim_is_ready() -> None:
    with bench() as b:
        slot = b.hold("r", "l1a")["l1a"]
        tables = b.pool.tables
        begin, end = tables.directory[slot, 1].tolist()
        assert end - begin == 1
        a_offset = int(tables.pages[begin, 0])
        assert torch.equal(tables.arena[a_offset : a_offset + 256], torch.ones(256))


def test_events_tell_tiers_times_and_bytes() -> None:
    with bench() as b:
        b.hold("r", "l2a")
        moves = [e for e in b.events if isinstance(e, AdapterMoved)]
        assert [(e.tier, e.reason, e.bytes) for e in moves] == [
            ("host", "load", 2 * LARGE),
            ("device", "load", 2 * LARGE),
        ]
        assert all(e.seconds >= 0 for e in moves)


def test_the_least_recently_used_adapter_is_evicted_and_stays_on_the_host() -> None:
    with bench(slabs=SLABS) as b:
        names = [f"l4{i}" for i in range(SLABS // 4)]
        b.use(*names)
        for name in (names[1], names[0], *names[2:]):
            b.use(name)
        b.use("l4new")
        assert b.tier(names[1]) == "host"
        assert all(b.tier(n) == "device" for n in [names[0], *names[2:], "l4new"])
        loads = len(b.store.loads)
        b.use(names[1])
        assert len(b.store.loads) == loads  # from the host's copy
        assert b.tier(names[0]) == "host"


def test_an_adapter_in_use_is_never_evicted() -> None:
    with bench() as b:
        slots = b.hold("runs", "l8a")
        for i in range(6):
            b.use(f"l8{i}")
        assert b.residency.ready("runs") == slots
        assert b.tier("l8a") == "device"


def test_release_is_idempotent_and_unknown_keys_are_ignored() -> None:
    with bench() as b:
        b.hold("r", "s1a")
        for key in ("r", "r", "never"):
            b.residency.release(key)
        assert b.residency.ready("r") is None
        assert b.residency.failed("never") is None


def test_the_same_key_can_not_claim_twice() -> None:
    with bench() as b:
        b.residency.claim("r", ["s1a"])
        with pytest.raises(ValueError, match="'r'"):
            b.residency.claim("r", ["s1b"])


def test_a_slow_load_does_not_delay_claims_on_resident_adapters() -> None:
    with bench() as b:
        b.use("s1here")
        b.store.close_gate()
        b.residency.claim("slow", ["s1slow"])
        b.poll()
        b.residency.claim("quick", ["s1here"])
        b.poll()
        assert b.residency.ready("quick") is not None
        assert b.residency.ready("slow") is None
        b.store.gate.release()
        b.settle()
        assert b.residency.ready("slow") is not None


def test_a_failing_load_fails_its_claims_alone_and_can_be_tried_again() -> None:
    with bench() as b:
        b.store.broken.add("s1bad")
        b.residency.claim("one", ["s1bad", "s1good"])
        b.residency.claim("two", ["s1good"])
        b.settle()
        assert "s1bad: no such file" in str(b.residency.failed("one"))
        assert b.residency.ready("one") is None
        assert b.residency.ready("two") is not None
        assert [e.digest for e in b.events if isinstance(e, AdapterFailed)] == ["s1bad"]
        b.store.broken.clear()
        b.residency.release("one")
        assert b.hold("again", "s1bad")


def test_a_composition_larger_than_the_budget_fails_with_the_figures() -> None:
    with bench() as b:
        b.residency.claim("r", ["l9a", "l9b"])
        b.settle()
        error = str(b.residency.failed("r"))
        assert str(18 * LARGE) in error
        assert str(SLABS * SLAB) in error
        assert "adapter_device_bytes" in error


def test_the_oldest_claim_waits_for_running_requests_but_not_for_new_ones() -> None:
    with bench() as b:
        b.hold("run0", "l8a")
        b.hold("other", "l8b")
        b.residency.claim("big", ["l9big"])
        b.settle()
        assert b.residency.ready("big") is None
        for i in range(1, 20):  # requests for the hot adapters keep arriving
            b.residency.claim(f"run{i}", ["l8a"])
            b.poll()
            assert b.residency.ready(f"run{i}") is None, "new use of an adapter that must give way"
        b.residency.release("run0")
        b.residency.release("other")
        b.settle()
        assert b.residency.ready("big") is not None
        b.residency.release("big")
        b.settle()
        assert all(b.residency.ready(f"run{i}") is not None for i in range(1, 20))


def test_only_as_many_adapters_as_needed_give_way() -> None:
    with bench() as b:
        b.hold("run0", "l8a")
        b.hold("run1", "l8b")
        b.residency.claim("new", ["l7c"])
        b.settle()
        assert b.residency.ready("new") is None
        b.residency.claim("more0", ["l8a"])
        b.residency.claim("more1", ["l8b"])
        b.poll()
        assert b.residency.ready("more0") is None  # l8a is the least recently used
        assert b.residency.ready("more1") is not None


def test_adapters_give_way_no_longer_once_the_claim_is_withdrawn() -> None:
    with bench() as b:
        b.hold("run0", "l8a")
        b.hold("run1", "l8b")
        b.residency.claim("new", ["l9c"])
        b.settle()
        b.residency.claim("more", ["l8a"])
        b.poll()
        assert b.residency.ready("more") is None
        b.residency.release("new")
        b.poll()
        assert b.residency.ready("more") is not None


def test_an_older_claim_takes_what_a_younger_one_waits_with() -> None:
    with bench() as b:
        b.hold("runs", "l8x")
        b.store.close_gate()
        b.residency.claim("old", ["l4a", "l4b"])
        b.residency.claim("young", ["l4c", "l8d"])
        b.store.gate.release(1000)
        b.settle()
        assert b.residency.ready("old") is not None
        assert b.residency.ready("young") is None
        b.residency.release("runs")
        b.residency.release("old")
        b.settle()
        assert b.residency.ready("young") is not None


def test_a_fragmented_device_is_cleared_for_the_claim_it_holds_up() -> None:
    """Small pages of one adapter spread over many slabs must not keep out large ones for ever."""
    with bench() as b:
        for i in range(8):
            b.use(f"s3{i}", f"s4{i}", f"s1{i}")
        b.hold("keeps", "s30", "s31")
        b.residency.claim("large", ["s32", "l9a", "l4b"])
        b.settle()
        b.residency.release("keeps")
        b.settle()
        assert b.residency.ready("large") is not None


def test_a_pinned_adapter_is_brought_and_never_evicted_until_unpinned() -> None:
    with bench() as b:
        b.residency.pin("l8p", True)
        b.settle()
        assert b.tier("l8p") == "device"
        for i in range(4):
            b.use(f"l8{i}")
        assert b.tier("l8p") == "device"
        b.residency.pin("l8p", False)
        b.use("l80", "l81")
        assert b.tier("l8p") == "host"


def test_pins_over_the_budget_are_refused_with_the_figures() -> None:
    with bench() as b:
        for name in ("l8a", "l8b", "l8c"):
            b.residency.pin(name, True)
            b.settle()
        errors = [e for e in b.events if isinstance(e, AdapterFailed)]
        assert [e.digest for e in errors] == ["l8c"]
        assert str(24 * LARGE) in errors[0].error
        assert b.tier("l8a") == b.tier("l8b") == "device"


def test_a_claim_with_no_room_beside_the_pinned_fails_and_says_so() -> None:
    with bench() as b:
        b.residency.pin("l9p", True)
        b.settle()
        b.residency.claim("r", ["l9a"])
        b.settle()
        assert f"{9 * LARGE} bytes are pinned" in str(b.residency.failed("r"))
        b.residency.release("r")
        assert b.hold("with the pinned one", "l9p", "l4a")


def test_prefetch_brings_an_adapter_to_the_tier_named() -> None:
    with bench() as b:
        b.residency.prefetch("s1d", "device")
        b.residency.prefetch("s1h", "host")
        b.settle()
        assert (b.tier("s1d"), b.tier("s1h")) == ("device", "host")


def test_prefetch_never_takes_an_adapter_that_is_in_use() -> None:
    with bench() as b:
        b.hold("r", "l9a")
        b.residency.prefetch("l9b", "device")
        b.settle()
        assert b.tier("l9b") == "host"
        assert b.residency.ready("r") is not None


def test_a_prefetch_that_fails_is_told_and_forgotten() -> None:
    with bench() as b:
        b.store.broken.add("s1bad")
        b.residency.prefetch("s1bad", "device")
        b.settle()
        assert [type(e) for e in b.events] == [AdapterFailed]
        assert b.store.loads == ["s1bad"]


def test_forget_waits_for_the_requests_that_use_the_adapter() -> None:
    with bench() as b:
        b.hold("r", "s2a")
        b.residency.forget("s2a")
        b.settle()
        assert b.tier("s2a") == "device"
        b.residency.release("r")
        b.poll()
        assert b.tier("s2a") == "disk"
        assert b.events[-1].reason == "forget"  # type: ignore[union-attr]
        assert b.pool.used_bytes == 0


def test_a_claim_after_forget_loads_anew() -> None:
    with bench() as b:
        b.use("s2a")
        b.residency.forget("s2a")
        b.poll()
        b.use("s2a")
        assert b.store.loads == ["s2a", "s2a"]
        assert b.tier("s2a") == "device"


def test_the_host_tier_keeps_to_its_budget_least_recently_used_first() -> None:
    with bench(host=3 * LARGE) as b:
        for name in ("l1a", "l1b", "l1c", "l1d"):
            b.use(name)
        b.poll()
        assert set(b.residency.host_images) == {"l1b", "l1c", "l1d"}
        assert b.tier("l1a") == "device"
        b.use("l8x", "l8y")
        assert b.tier("l1a") == "disk"
        assert sum(b.residency.host_images.values()) <= 3 * LARGE


def test_an_adapter_larger_than_the_host_budget_still_reaches_the_device() -> None:
    with bench(host=LARGE) as b:
        assert b.hold("r", "l4a", "l4b")
        b.poll()
        assert b.residency.host_images == {}
        b.residency.release("r")
        b.use("l8a", "l8b")
        assert b.tier("l4a") == "disk"


def test_one_memory_holds_no_second_copy_of_resident_adapters() -> None:
    with bench(one_memory=True) as b:
        slots = b.hold("r", "l4a", "l1b")
        assert b.residency.host_images == {}
        assert b.tier("l4a") == b.tier("l1b") == "device"
        begin = int(b.pool.tables.directory[slots["l1b"], 1, 0])
        a_offset = int(b.pool.tables.pages[begin, 0])
        assert torch.equal(b.pool.tables.arena[a_offset : a_offset + 256], torch.ones(256))


def test_one_memory_holds_images_again_once_an_adapter_had_to_give_way() -> None:
    with bench(one_memory=True) as b:
        for name in ("l8a", "l8b", "l8c"):
            b.use(name)
        assert b.tier("l8a") == "disk"  # given way to l8c: there was no image of it
        assert set(b.residency.host_images) == {"l8c"}
        b.use("l8a", "l8d")
        assert b.tier("l8b") == "disk"
        assert b.tier("l8c") == "host"
        loads = len(b.store.loads)
        b.use("l8c", "l8a")
        assert len(b.store.loads) == loads


def test_one_memory_keeps_what_is_prefetched_to_the_host() -> None:
    with bench(one_memory=True) as b:
        b.use("s1a")
        b.residency.prefetch("s1h", "host")
        b.settle()
        assert b.tier("s1h") == "host"
        assert set(b.residency.host_images) == {"s1h"}


def test_many_waiting_claims_do_not_thrash_a_small_host_tier() -> None:
    with bench(host=9 * LARGE) as b:
        b.hold("runs", "l8x", "l8y")
        for i in range(8):
            b.residency.claim(f"c{i}", [f"l8{i}"])
        b.settle()
        b.poll()
        assert len(b.store.loads) <= 2 + 4  # one to keep, three more before their size is known
        b.residency.release("runs")
        for i in range(8):
            b.settle()
            assert b.residency.ready(f"c{i}") is not None
            b.residency.release(f"c{i}")


def test_close_ends_the_thread_with_loads_still_queued() -> None:
    before = threading.active_count()
    made = Bench()
    made.store.close_gate()
    for i in range(4):
        made.residency.claim(f"c{i}", [f"s1{i}"])
    made.poll()
    made.store.gate.release(1)
    made.residency.close()
    assert threading.active_count() == before
    assert len(made.store.loads) <= 1


def test_the_loader_pauses_only_beside_running_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", pauses.append)
    for busy, expected in ((False, 0), (True, 9)):
        pacer = Pacer(lambda busy=busy: busy)  # type: ignore[misc]
        for _ in range(100):
            now[0] += 0.00005
            pacer()
        assert len(pauses) in (expected, expected + 1)


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_memory_stays_level_over_500_loads() -> None:
    with bench(host=8 * LARGE) as b:
        for i in range(50):
            b.use(f"l2{i}")
        tensors = count_tensors()
        rows = b.pool.tables.pages.shape[0]
        entries = b.residency.known
        for i in range(50, 550):
            b.use(f"l2{i}")
        assert count_tensors() <= tensors + 2
        assert b.pool.tables.pages.shape[0] == rows
        assert b.residency.known <= entries + 1
        assert len(b.store.loads) == 550


ADAPTERS = [
    "s1a",
    "s3b",
    "s9c",
    "l1d",
    "l3e",
    "l4f",
    "l6g",
    "l8h",
    "l9i",
    "s2j",
    "t3k",
    "b5m",
    "x1n",
]


class Requests(RuleBasedStateMachine):
    """Requests come, run and go while adapters load, fail and are administered."""

    one_memory = False

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(host=10 * LARGE, one_memory=self.one_memory)
        self.bench.store.close_gate()
        self.claims: dict[str, list[str]] = {}
        self.held: dict[str, dict[str, int]] = {}
        self.count = 0

    @rule(digests=st.lists(st.sampled_from(ADAPTERS), min_size=1, max_size=3, unique=True))
    def claim(self, digests: list[str]) -> None:
        self.count += 1
        self.claims[f"r{self.count}"] = digests
        self.bench.residency.claim(f"r{self.count}", digests)

    @precondition(lambda self: self.claims)
    @rule(choice=st.integers(0, 1000))
    def release(self, choice: int) -> None:
        key = sorted(self.claims)[choice % len(self.claims)]
        del self.claims[key]
        self.held.pop(key, None)
        self.bench.residency.release(key)

    @rule()
    def ask(self) -> None:
        for key in self.claims:
            slots = self.bench.residency.ready(key)
            if key in self.held:
                assert slots == self.held[key], "a held claim lost its adapters"
            elif slots is not None:
                assert set(slots) == set(self.claims[key])
                self.held[key] = slots

    @rule(count=st.integers(1, 5))
    def load_some(self, count: int) -> None:
        self.bench.store.gate.release(count)
        self.bench.step()

    @rule()
    def poll(self) -> None:
        self.bench.poll()

    @rule(digest=st.sampled_from(ADAPTERS))
    def toggle_broken(self, digest: str) -> None:
        self.bench.store.broken ^= {digest}

    @rule(digest=st.sampled_from(ADAPTERS), tier=st.sampled_from(["device", "host"]))
    def prefetch(self, digest: str, tier: str) -> None:
        self.bench.residency.prefetch(digest, tier)  # type: ignore[arg-type]

    @rule(digest=st.sampled_from(["s1a", "l3e", "l4f"]), pinned=st.booleans())
    def pin(self, digest: str, pinned: bool) -> None:
        self.bench.residency.pin(digest, pinned)

    @rule(digest=st.sampled_from(ADAPTERS))
    def forget(self, digest: str) -> None:
        self.bench.residency.forget(digest)

    @invariant()
    def sound(self) -> None:
        self.bench.residency.check_integrity()

    def teardown(self) -> None:
        """Every claim left is met or failed in order, given only that running requests end."""
        try:
            self.bench.store.gate.release(2000)
            while self.claims:
                oldest = next(iter(self.claims))
                for _ in range(3):  # each round ends what runs
                    self.bench.settle()
                    self.ask()
                    over = {k for k in self.claims if k in self.held or self.failed(k)}
                    for key in over:
                        self.held.pop(key, None)
                        del self.claims[key]
                        self.bench.residency.release(key)
                assert oldest not in self.claims, f"{oldest} starves"
        finally:
            self.bench.store.gate.release(2000)
            self.bench.residency.close()

    def failed(self, key: str) -> str | None:
        return self.bench.residency.failed(key)


class RequestsInOneMemory(Requests):
    """The same where the device's memory is the host's."""

    one_memory = True


TestRequests = Requests.TestCase
TestRequestsInOneMemory = RequestsInOneMemory.TestCase
# No shrinking: with a thread in the loop it takes minutes.
TestRequests.settings = TestRequestsInOneMemory.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, phases=[Phase.explicit, Phase.generate]
)
