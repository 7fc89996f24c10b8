"""What the pool's tables say of a GPU's grids, as adapters come and go."""

from __future__ import annotations

import torch

from quickchange_server.adapters.image import build_image, page_shapes
from quickchange_server.adapters.layout import Member, ModuleGroup
from quickchange_server.adapters.pool import DevicePool
from quickchange_store.canonical import CanonicalAdapter, LowRankUpdate

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


def test_most_pages_follow_the_resident_adapters_in_powers_of_two() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    assert most_pages(pool) == [1, 1, 1]
    small = load(pool, q=8, k=8)
    assert most_pages(pool) == [2, 1, 1]
    large = load(pool, q=40, k=1, o=24)
    assert most_pages(pool) == [8, 4, 1]
    pool.free(large)
    assert most_pages(pool) == [2, 1, 1]
    pool.free(small)
    assert most_pages(pool) == [1, 1, 1]


def test_more_adapters_than_the_first_tables_hold_are_counted() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    for _ in range(20):
        load(pool, q=1)
    load(pool, q=17)
    assert most_pages(pool) == [4, 1, 1]


def test_groups_of_odd_sizes_are_not_aligned() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, torch.device("cpu"))
    assert [shape.aligned for shape in pool.tables.shapes] == [True, False, True]
