"""Adapters with Turbo heads on the tiers: one entry, one slot, one budget with all others."""

from __future__ import annotations

import torch
from residency_bench import HEAD, HIDDEN, LARGE, SLAB, SLABS, Bench, bench, make_adapter

from quickchange_kernels.turbo_heads.turbo_heads_contract import in_pages
from quickchange_server.protocol import AdapterFailed, AdapterMoved


def check_bits(b: Bench, digest: str, slot: int) -> None:
    """That the slot's heads are those of the adapter, and are in the arena."""
    turbo, found = make_adapter(digest[0], int(digest[1])).turbo, b.residency.turbo(slot)
    assert turbo is not None
    assert found is not None
    heads = b.residency.heads
    for own, blocks in zip(found.heads, turbo.heads, strict=True):
        begin, end = heads.matrices[own[0]].tolist()
        assert end - begin == 1
        place = int(heads.pages[begin])
        block = turbo.blocks[blocks[0]]
        expected = in_pages(block.weight, block.bias)[0]
        assert torch.equal(heads.arena[place : place + len(expected)], expected)


def test_a_claim_on_heads_is_ready_with_all_their_bits_on_the_device() -> None:
    with bench() as b:
        slots = b.hold("r", "t5a", "b3b", "l1c")
        check_bits(b, "t5a", slots["t5a"])
        check_bits(b, "b3b", slots["b3b"])
        assert b.residency.turbo(slots["l1c"]) is None
        assert b.residency.updates(slots["b3b"], 1)
        assert not b.residency.updates(slots["b3b"], 0)
        assert not b.residency.updates(slots["t5a"], 1)
        assert b.pool.used_bytes == 8 * HEAD + 2 * LARGE


def test_heads_are_part_of_the_bytes_that_events_tell() -> None:
    with bench() as b:
        b.hold("r", "b3a")
        moves = [e for e in b.events if isinstance(e, AdapterMoved)]
        assert [(e.tier, e.bytes) for e in moves] == [
            ("host", LARGE + 3 * HEAD),
            ("device", LARGE + 3 * HEAD),
        ]


def test_heads_are_evicted_with_their_adapter_and_come_back_with_all_their_bits() -> None:
    with bench() as b:
        b.use("t5a", "b3b")
        b.use("l8x", "l8y")
        assert b.tier("t5a") == b.tier("b3b") == "host"
        assert b.pool.used_bytes == 16 * LARGE
        loads = len(b.store.loads)
        slots = b.hold("r", "t5a", "b3b")
        assert len(b.store.loads) == loads
        check_bits(b, "t5a", slots["t5a"])
        check_bits(b, "b3b", slots["b3b"])


def test_heads_in_use_are_never_evicted() -> None:
    with bench() as b:
        slots = b.hold("runs", "t9a")
        for i in range(6):
            b.use(f"l7{i}")
        assert b.tier("t9a") == "device"
        check_bits(b, "t9a", slots["t9a"])


def test_pinned_heads_stay() -> None:
    with bench() as b:
        b.residency.pin("t9p", True)
        b.settle()
        for i in range(6):
            b.use(f"l7{i}")
        assert b.tier("t9p") == "device"


def test_forgotten_heads_leave_nothing_behind() -> None:
    with bench() as b:
        b.use("b3a")
        b.residency.forget("b3a")
        b.poll()
        assert b.tier("b3a") == "disk"
        assert b.pool.used_bytes == 0
        assert b.residency.host_images == {}


def test_more_heads_than_the_budget_fail_with_the_figures() -> None:
    with bench() as b:
        b.residency.claim("r", ["t9a", "t9b"])  # a slab holds one page of a head
        b.settle()
        error = str(b.residency.failed("r"))
        assert str(18 * HEAD) in error
        assert str(SLABS * SLAB) in error
        assert "fewer heads" in error


def test_heads_of_another_base_fail_their_claims_alone() -> None:
    with bench() as b:
        b.residency.claim("bad", ["x1a", "t1b"])
        b.residency.claim("good", ["t1b"])
        b.settle()
        assert f"from {HIDDEN + 1} features" in str(b.residency.failed("bad"))
        assert b.residency.ready("good") is not None
        assert [e.digest for e in b.events if isinstance(e, AdapterFailed)] == ["x1a"]


def test_memory_stays_level_over_many_heads() -> None:
    with bench(host=8 * LARGE) as b:
        for i in range(20):
            b.use(f"b4{i}")
        tables = b.residency.heads
        for i in range(20, 220):
            b.use(f"b4{i}")
        assert b.residency.heads is tables
