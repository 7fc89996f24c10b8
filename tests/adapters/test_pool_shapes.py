"""What the pool's tables say of a GPU's grids, as adapters come and go."""

from __future__ import annotations

import torch

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


def most_pages(pool: DevicePool) -> list[int]:
    return [shape.most_pages for shape in pool.tables.shapes]


def test_grids_are_wide_enough_for_rank_16_and_widen_in_powers_of_two() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    assert most_pages(pool) == [4, 2, 2]
    load(pool, q=16, k=16, o=16)
    assert most_pages(pool) == [4, 2, 2]
    load(pool, q=40, k=1, o=24)
    assert most_pages(pool) == [8, 4, 2]


def test_grids_stay_wide_when_an_adapter_goes_so_that_graphs_stay_valid() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    pool.free(load(pool, q=40, k=1, o=24))
    tables = pool.tables
    assert most_pages(pool) == [8, 4, 2]
    pool.free(load(pool, q=40, k=1, o=24))
    assert pool.tables is tables


def test_more_adapters_than_the_first_tables_hold_widen_grids_too() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    for _ in range(100):
        load(pool, q=1)
    load(pool, q=40)
    assert most_pages(pool) == [8, 2, 2]


def test_groups_of_odd_sizes_are_not_aligned() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    assert [shape.aligned for shape in pool.tables.shapes] == [True, False, True]
