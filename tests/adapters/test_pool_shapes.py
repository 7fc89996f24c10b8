"""What the pool's tables say of a GPU's grids, as adapters come and go."""

from __future__ import annotations

from operator import le

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

GROUPS = [
    ModuleGroup(0, "linear", 16, 24, (Member("q", 0, 16), Member("k", 16, 8))),
    ModuleGroup(1, "linear", 16, 12, (Member("o", 0, 12),)),
    ModuleGroup(2, "embedding", 91, 16, (Member("embed", 0, 16),)),
]
SHAPES = {"q": (16, 16), "k": (16, 8), "o": (16, 12), "embed": (91, 16)}


def load(pool: DevicePool, **ranks: int) -> int:
    updates = {}
    for path, rank in ranks.items():
        features, width = SHAPES[path]
        updates[path] = LowRankUpdate(torch.ones(rank, features), torch.ones(width, rank), 1.0)
    adapter = CanonicalAdapter("Tiny", "tiny", updates)
    image = build_image(adapter, page_shapes(GROUPS, torch.float32), torch.float32)
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    return slot


def make_pool(**options: int) -> DevicePool:
    return DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"), **options)


def most_pages(tables: LowRankTables) -> list[int]:
    return [shape.most_pages for shape in tables.shapes]


def pages(pool: DevicePool, slot: int) -> list[int]:
    begin, end = pool.tables.directory[slot].T
    return (end - begin).tolist()


@pytest.mark.parametrize(("rank", "expected"), [(8, [4, 2, 2]), (64, [18, 9, 9]), (60, [18, 9, 9])])
def test_grids_cover_the_usual_rank_with_a_bias_or_a_gain(rank: int, expected: list[int]) -> None:
    assert most_pages(make_pool(most_rank=rank).tables) == expected


Sizes = st.fixed_dictionaries({}, optional={path: st.integers(1, 80) for path in SHAPES})


@given(st.lists(st.tuples(Sizes, st.booleans()), max_size=12), st.integers(1, 64))
@settings(deadline=None)
def test_whatever_comes_and_goes_graphs_keep_their_tables_and_every_grid_is_wide_enough(
    traffic: list[tuple[dict[str, int], bool]], most_rank: int
) -> None:
    pool = make_pool(most_rank=most_rank)
    tables, resident = pool.tables, []
    for ranks, free in traffic:
        if free and resident:
            pool.free(resident.pop())
        else:
            resident.append(load(pool, **ranks))
        assert pool.tables is tables
        for slot in resident:
            own = pool.tables_of([slot])
            assert all(map(le, pages(pool, slot), most_pages(own)))
            assert (own is tables) == all(map(le, pages(pool, slot), most_pages(tables)))
        whole = most_pages(pool.tables_of(resident))
        assert all(all(map(le, pages(pool, slot), whole)) for slot in resident)
        assert all(map(le, whole, most_pages(pool.wide_tables)))


def test_the_directory_has_room_for_as_many_adapters_as_the_arena_or_evicts() -> None:
    pool = make_pool()
    tables, count = pool.tables, 0
    update = LowRankUpdate(torch.ones(0, 16), torch.ones(16, 0), 1.0)
    nothing = CanonicalAdapter("Tiny", "tiny", {"q": update})
    image = build_image(nothing, page_shapes(GROUPS, torch.float32), torch.float32)
    while pool.allocate(image) is not None:
        count += 1
    assert count == pool.tables.directory.shape[0] >= 256
    assert pool.tables is tables
    assert not pool.fits([image.demand], pool.slots)
    assert pool.fits([image.demand], pool.slots[1:])


def test_groups_of_odd_sizes_are_not_aligned() -> None:
    assert [shape.aligned for shape in make_pool().tables.shapes] == [True, False, True]
