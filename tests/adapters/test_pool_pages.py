"""Rank pages: content against float64 mathematics, accounting against a state machine."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quickchange_kernels.lowrank.lowrank_contract import (
    Segments,
    reference_lowrank,
    reference_lowrank_embedding,
)
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_server.adapters.slab_allocator import Grant, RunAllocator, SlabAllocator, slab_size
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

CPU = torch.device("cpu")
GROUPS = (
    ModuleGroup(0, "linear", 13, 30, (Member("q", 0, 18), Member("k", 18, 5), Member("v", 23, 7))),
    ModuleGroup(1, "linear", 18, 13, (Member("o", 0, 13),)),
    ModuleGroup(2, "embedding", 101, 13, (Member("embed", 0, 13),)),
)
SHAPES = {m.path: (g.in_features, m.width) for g in GROUPS for m in g.members}


def update(path: str, rank: int, *, bias: bool = False, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    features, width = SHAPES[path]
    return LowRankUpdate(
        a=torch.randn(rank, features, generator=generator),
        b=torch.randn(width, rank, generator=generator),
        scale=0.5 + seed % 3,
        bias=torch.randn(width, generator=generator) if bias else None,
    )


def adapter(**updates: LowRankUpdate) -> CanonicalAdapter:
    return CanonicalAdapter("Tiny", "tiny", updates)


def image_of(source: CanonicalAdapter, dtype: torch.dtype = torch.float32) -> AdapterImage:
    return build_image(source, page_shapes(GROUPS, dtype), dtype)


def make_pool(budget: int = 1 << 20, dtype: torch.dtype = torch.float32) -> DevicePool:
    return DevicePool(GROUPS, budget, dtype, CPU)


def load(pool: DevicePool, image: AdapterImage) -> int:
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    return slot


def segment(rows: int, slot: int, weight: float) -> Segments:
    return Segments(
        torch.tensor([[0, rows]], dtype=torch.int32),
        torch.tensor([slot], dtype=torch.int32),
        torch.tensor([weight]),
    )


def applied(pool: DevicePool, slot: int, group: ModuleGroup, x: torch.Tensor) -> torch.Tensor:
    """What the arena's content adds to a zero output, by the kernels' reference, at weight 0.7."""
    y = torch.zeros(x.shape[0], group.out_features, dtype=torch.float64)
    segments = segment(x.shape[0], slot, 0.7)
    if group.kind == "embedding":
        return reference_lowrank_embedding(
            y, x, pool.tables, segments, group.index, group.in_features
        )
    return reference_lowrank(y, x, pool.tables, segments, group.index)


def expected(source: CanonicalAdapter, group: ModuleGroup, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], group.out_features, dtype=torch.float64)
    if group.kind == "embedding":
        x = torch.nn.functional.one_hot(x, group.in_features)
    for member in group.members:
        low = source.updates.get(member.path)
        if low is not None:
            delta = low.scale * (x.double() @ low.a.double().T) @ low.b.double().T
            delta = delta + (0 if low.bias is None else low.bias.double())
            y[:, member.column : member.column + member.width] += 0.7 * delta
    return y


def inputs(group: ModuleGroup) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if group.kind == "embedding":
        return torch.randint(0, group.in_features, (6,), generator=generator)
    return torch.randn(6, group.in_features, generator=generator)


ADAPTERS = {
    "rank 8": adapter(q=update("q", 8)),
    "rank below a page": adapter(o=update("o", 3, seed=1)),
    "rank over a page": adapter(v=update("v", 21, seed=2)),
    "mixed ranks": adapter(q=update("q", 4), k=update("k", 16, seed=1), v=update("v", 9, seed=2)),
    "all modules": adapter(**{path: update(path, 10, seed=i) for i, path in enumerate(SHAPES)}),
    "rank and bias": adapter(o=update("o", 8, bias=True, seed=1), q=update("q", 5, bias=True)),
    "bias only": adapter(k=update("k", 0, bias=True, seed=2)),
    "rank 0 without bias": adapter(k=update("k", 0)),
    "embedding": adapter(embed=update("embed", 12, seed=4)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_arena_computes_the_adapters_updates(name: str) -> None:
    pool, source = make_pool(), ADAPTERS[name]
    load(pool, image_of(ADAPTERS["all modules"]))  # a neighbour
    slot = load(pool, image_of(source))
    for group in GROUPS:
        x = inputs(group)
        torch.testing.assert_close(applied(pool, slot, group, x), expected(source, group, x))
    pool.check_integrity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_arenas_hold_the_rounded_weights(dtype: torch.dtype) -> None:
    pool, source = make_pool(dtype=dtype), ADAPTERS["all modules"]
    rounded = adapter(
        **{
            path: dataclasses.replace(u, a=u.a.to(dtype), b=u.b.to(dtype))
            for path, u in source.updates.items()
        }
    )
    slot = load(pool, image_of(source, dtype))
    for group in GROUPS:
        x = inputs(group)
        torch.testing.assert_close(applied(pool, slot, group, x), expected(rounded, group, x))


def test_pages_larger_than_one_piece_are_copied_whole() -> None:
    group = ModuleGroup(0, "linear", 9000, 5000, (Member("wide", 0, 5000),))
    low = LowRankUpdate(torch.randn(11, 9000), torch.randn(5000, 11), 1.5)
    source = CanonicalAdapter("Tiny", "tiny", {"wide": low})
    pool = DevicePool((group,), 1 << 22, torch.float32, CPU)
    slot = load(pool, build_image(source, page_shapes((group,), torch.float32), torch.float32))
    x = torch.randn(2, 9000)
    torch.testing.assert_close(applied(pool, slot, group, x), expected(source, group, x))


def test_a_page_is_eight_ranks_and_nothing_pads_further() -> None:
    eight, nine, sixteen = (image_of(adapter(q=update("q", r))).nbytes for r in (8, 9, 16))
    assert nine == sixteen == 2 * eight
    assert eight == 4 * (112 + 8 * 18)  # A is 8 · 13 = 104 values, rounded up to 64 bytes


def test_a_slot_is_invisible_until_it_is_published() -> None:
    pool, image = make_pool(), image_of(ADAPTERS["all modules"])
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    assert not pool.tables.directory[slot].any()
    pool.publish(slot)
    assert pool.tables.directory[slot].any()
    pool.free(slot)
    assert not pool.tables.directory[slot].any()


def test_rows_that_move_together_take_their_adapters_with_them() -> None:
    """Free rows lie between used ones, and the next adapter needs them as one run."""
    pool, small = make_pool(1 << 15), adapter(o=update("o", 8))
    slots = []
    while (slot := pool.allocate(image_of(small))) is not None:
        pool.write(slot, image_of(small))
        pool.publish(slot)
        slots.append(slot)
    for slot in slots[::2]:
        pool.free(slot)
    capacity, tables = pool.tables.pages.shape[0], pool.tables
    large = adapter(o=update("o", 8 * (capacity // 2 - 20), seed=1))
    wide = load(pool, image_of(large))
    assert pool.tables is tables
    group = GROUPS[1]
    x = inputs(group)
    for slot, source in [*((slot, small) for slot in slots[1::2]), (wide, large)]:
        torch.testing.assert_close(applied(pool, slot, group, x), expected(source, group, x))
    pool.check_integrity()


def test_gains_alone_fill_the_tables_rows_and_are_not_refused() -> None:
    """An arena has room for more short pages than the page table for rows."""
    pool = make_pool(1 << 20)
    gains = {
        path: dataclasses.replace(update(path, 0), gain=torch.ones(SHAPES[path][1]))
        for path in "qo"
    }
    image, slots = image_of(adapter(**gains)), []
    while (slot := pool.allocate(image)) is not None:
        slots.append(slot)
    assert len(slots) >= 256
    assert pool.used_bytes < pool.budget_bytes // 2
    pool.free(slots.pop())
    assert pool.allocate(image) is not None
    pool.check_integrity()


def test_freed_pages_serve_other_page_sizes() -> None:
    pool = make_pool(1 << 18)
    for path in SHAPES:
        image, slots = image_of(adapter(**{path: update(path, 8)})), []
        while (slot := pool.allocate(image)) is not None:
            slots.append(slot)
        assert pool.used_bytes > 0.85 * (1 << 18)
        for slot in slots:
            pool.free(slot)
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_an_adapter_larger_than_the_budget_is_refused_with_both_figures() -> None:
    pool = make_pool(1 << 14)
    image = image_of(adapter(q=update("q", 400)))
    with pytest.raises(AdapterFailedError, match="adapter_device_bytes") as caught:
        pool.allocate(image)
    assert str(image.nbytes) in str(caught.value)
    assert str(1 << 14) in str(caught.value)


def test_a_budget_below_one_page_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"adapter_device_bytes \(1024 bytes\)"):
        make_pool(1024)


def test_a_module_that_the_model_lacks_is_named() -> None:
    stray = CanonicalAdapter("Tiny", "tiny", {"layers.9.q": update("q", 8)})
    with pytest.raises(AdapterFailedError, match=r"layers\.9\.q"):
        image_of(stray)


def test_an_update_of_other_shapes_is_named() -> None:
    with pytest.raises(AdapterFailedError, match="o: the update maps 13 to 18"):
        image_of(adapter(o=update("q", 8)))


def test_half_the_budget_serves_half_the_modules_as_well_as_all() -> None:
    """A budget is not divided among page sizes ahead of time."""
    pool = make_pool(1 << 18)
    image, count = image_of(adapter(o=update("o", 8))), 0
    while pool.allocate(image) is not None:
        count += 1
    assert count * image.nbytes > 0.85 * (1 << 18)


@pytest.mark.parametrize(
    ("sizes", "span"), [({100}, 10_000), ({100, 7000}, 10_000), ({5, 50, 500}, 10**7), ({9}, 9)]
)
def test_slabs_hold_the_largest_page_and_divide_the_span(sizes: set[int], span: int) -> None:
    slab = slab_size(sizes, span, preferred=1000)
    assert max(sizes) <= slab <= span


class Slabs(RuleBasedStateMachine):
    """Pages of three sizes come and go; a pool of 40 slabs of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.space = SlabAllocator(40 * 64 + 13, 64)
        self.grants: list[Grant] = []

    @rule(demand=st.dictionaries(st.sampled_from([7, 16, 64]), st.integers(1, 60), max_size=3))
    def allocate(self, demand: dict[int, int]) -> None:
        fits = self.space.fits(demand, self.grants)
        grant = self.space.allocate(demand)
        assert (grant is not None) == fits
        if grant is not None:
            assert {size: len(at) for size, at in grant.pages.items()} == demand
            self.grants.append(grant)

    @precondition(lambda self: self.grants)
    @rule(choice=st.integers(0, 1000))
    def free(self, choice: int) -> None:
        self.space.free(self.grants.pop(choice % len(self.grants)))

    @precondition(lambda self: self.grants)
    @rule(count=st.integers(1, 40), size=st.sampled_from([7, 16, 64]), choice=st.integers(0, 1000))
    def fits_is_what_freeing_the_others_gives(self, count: int, size: int, choice: int) -> None:
        kept = self.grants.pop(choice % len(self.grants))
        promised = self.space.fits({size: count}, [kept])
        for grant in self.grants:
            self.space.free(grant)
        self.grants = [kept]
        assert (self.space.allocate({size: count}) is not None) == promised
        self.space = SlabAllocator(40 * 64 + 13, 64)
        self.grants = []

    @invariant()
    def sound(self) -> None:
        self.space.check_integrity(self.grants)
        pages = sorted(
            (at, at + size)
            for grant in self.grants
            for size, offsets in grant.pages.items()
            for at in offsets
        )
        assert all(a[1] <= b[0] for a, b in pairwise(pages))


class Runs(RuleBasedStateMachine):
    """Runs of rows come and go; closed up, all that is free serves one run."""

    def __init__(self) -> None:
        super().__init__()
        self.space = RunAllocator(40)
        self.used: list[tuple[int, int]] = []

    @rule(count=st.integers(0, 20))
    def allocate(self, count: int) -> None:
        begin = self.space.allocate(count)
        if begin is None and sum(end - first for first, end in self.used) + count <= 40:
            self.used = self.space.close_up(sorted(self.used))
            begin = self.space.allocate(count)
            assert begin is not None
        if begin is not None:
            self.used.append((begin, begin + count))

    @precondition(lambda self: self.used)
    @rule(choice=st.integers(0, 1000))
    def free(self, choice: int) -> None:
        begin, end = self.used.pop(choice % len(self.used))
        self.space.free(begin, end - begin)

    @invariant()
    def sound(self) -> None:
        self.space.check_integrity(self.used)


class Pool(RuleBasedStateMachine):
    """Adapters of many shapes come and go; those there always compute what they should."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(1 << 15)
        self.tables = self.pool.tables
        self.slots: dict[int, CanonicalAdapter] = {}

    @rule(
        ranks=st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(0, 200), max_size=3),
        bias=st.booleans(),
        seed=st.integers(0, 100),
    )
    def add(self, ranks: dict[str, int], bias: bool, seed: int) -> None:
        source = adapter(**{p: update(p, r, bias=bias, seed=seed) for p, r in ranks.items()})
        image = image_of(source)
        if not self.pool.fits([image.demand], ()):
            return
        slot = self.pool.allocate(image)
        assert (slot is not None) == self.pool.fits([image.demand], self.slots)
        if slot is not None:
            assert slot not in self.slots
            self.pool.write(slot, image)
            self.pool.publish(slot)
            self.slots[slot] = source

    @precondition(lambda self: self.slots)
    @rule(choice=st.integers(0, 1000))
    def remove(self, choice: int) -> None:
        slot = sorted(self.slots)[choice % len(self.slots)]
        del self.slots[slot]
        self.pool.free(slot)

    @precondition(lambda self: self.slots)
    @rule(choice=st.integers(0, 1000), group=st.sampled_from(GROUPS))
    def compute(self, choice: int, group: ModuleGroup) -> None:
        slot = sorted(self.slots)[choice % len(self.slots)]
        x = inputs(group)
        torch.testing.assert_close(
            applied(self.pool, slot, group, x), expected(self.slots[slot], group, x)
        )

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.tables is self.tables, "captured graphs are void"


MACHINE = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestSlabs = Slabs.TestCase
TestSlabs.settings = MACHINE
TestRuns = Runs.TestCase
TestRuns.settings = MACHINE
TestPool = Pool.TestCase
TestPool.settings = MACHINE
