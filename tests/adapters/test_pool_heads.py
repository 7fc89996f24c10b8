"""Turbo heads in the adapters' arena: their bits, their tables, what they cost and when they go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    PAGE_ROWS,
    HeadTables,
    in_pages,
    page_elements,
)
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_server.adapters.turbo_packing import TurboShape, head_pages
from quickchange_server.adapters.turbo_tables import HeadPool, TurboSlot
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import TurboHeads

CPU = torch.device("cpu")
HIDDEN = 21  # no multiple of a page's 16 outputs
GROUPS = (ModuleGroup(0, "linear", 13, 30, (Member("q", 0, 30),)),)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TURBOS = {
    "parallel": make_turbo(HIDDEN, 3, blocks_a_head=2),
    "sequential with a vocabulary": make_turbo(
        HIDDEN, 3, sequential=True, vocabulary=range(5, 400, 7), seed=1
    ),
    "own LM heads": make_turbo(HIDDEN, 2, own_outputs=101, seed=2),
    "a long vocabulary": make_turbo(HIDDEN, 1, vocabulary=range(3, 3000), seed=3),
}


def lora(rank: int = 12) -> LowRankUpdate:
    return LowRankUpdate(torch.randn(rank, 13), torch.randn(30, rank), 0.5)


def image_of(adapter: CanonicalAdapter, dtype: torch.dtype = torch.float32) -> AdapterImage:
    return build_image(adapter, page_shapes(GROUPS, dtype), dtype)


def make_pool(budget: int = 1 << 20, dtype: torch.dtype = torch.float32) -> DevicePool:
    return DevicePool(GROUPS, budget, dtype, CPU)


def load(pool: DevicePool, adapter: CanonicalAdapter) -> int:
    image = image_of(adapter, pool.dtype)
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    return slot


def turbo_of(pool: DevicePool, slot: int) -> TurboSlot:
    found = pool.turbo(slot)
    assert found is not None
    return found


def held(heads: HeadTables, matrix: int, features: int) -> Tensor:
    """A matrix's pages as they lie in the arena: [pages, 16 (K + 1)]."""
    begin, end = heads.matrices[matrix].tolist()
    places = heads.pages[begin:end].tolist()
    assert not any(place * heads.arena.itemsize % 64 for place in places)
    size = page_elements(features)
    return torch.stack([heads.arena[place : place + size] for place in places])


def check_bits(pool: DevicePool, slot: int, turbo: TurboHeads) -> None:
    found, dtype = turbo_of(pool, slot), pool.dtype
    assert (found.depth, found.sequential) == (turbo.depth, turbo.sequential)
    for own, blocks in zip(found.heads, turbo.heads, strict=True):
        assert len(own) == len(blocks)
        for matrix, number in zip(own, blocks, strict=True):
            block = turbo.blocks[number]
            expected = in_pages(block.weight.to(dtype), block.bias.to(dtype))
            assert torch.equal(held(pool.heads, matrix, block.weight.shape[1]), expected)
    assert len(found.outputs) == len(turbo.outputs)
    for matrix, output in zip(found.outputs, turbo.outputs, strict=True):
        assert torch.equal(held(pool.heads, matrix, HIDDEN), in_pages(output.to(dtype)))
    if turbo.vocabulary is None:
        assert found.vocabulary is None
    else:
        assert found.vocabulary is not None
        assert torch.equal(found.vocabulary, turbo.vocabulary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TURBOS)
@pytest.mark.parametrize("updates", [True, False])
def test_every_bit_of_the_heads_is_in_the_arena(
    name: str, dtype: torch.dtype, updates: bool
) -> None:
    pool, turbo = make_pool(dtype=dtype), TURBOS[name]
    neighbour = load(pool, turbo_adapter(TURBOS["parallel"], q=lora()))
    slot = load(pool, turbo_adapter(turbo, **({"q": lora()} if updates else {})))
    check_bits(pool, slot, turbo)
    check_bits(pool, neighbour, TURBOS["parallel"])
    assert pool.updates(slot, 0) == updates
    pool.check_integrity()


def test_shared_blocks_lie_in_the_arena_once() -> None:
    turbo = make_turbo(HIDDEN, 5, sequential=True, shared=True)
    pool = make_pool()
    slot = load(pool, turbo_adapter(turbo))
    assert len(set(turbo_of(pool, slot).heads)) == 1
    pages = -(-HIDDEN // PAGE_ROWS)
    assert pool.used_bytes == pages * -(-page_elements(2 * HIDDEN) // 16) * 16 * 4


def test_heads_cost_their_pages_and_a_vocabulary_takes_one_of_the_same_size() -> None:
    without, with_list = (
        image_of(turbo_adapter(make_turbo(HIDDEN, 2, vocabulary=vocabulary)))
        for vocabulary in (None, range(50))
    )
    page = -(-page_elements(HIDDEN) // 16) * 16 * 4
    assert without.nbytes == 4 * page
    assert with_list.nbytes == 5 * page


def test_columns_say_how_many_tokens_are_chosen_from() -> None:
    pool = make_pool()
    columns = [turbo_of(pool, load(pool, turbo_adapter(t))).columns for t in TURBOS.values()]
    assert columns == [None, len(range(5, 400, 7)), 101, 2997]


def test_heads_are_invisible_until_published_and_gone_when_freed() -> None:
    pool, image = make_pool(), image_of(turbo_adapter(TURBOS["parallel"]))
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    assert pool.turbo(slot) is None
    pool.publish(slot)
    assert pool.turbo(slot) is not None
    pool.free(slot)
    assert pool.turbo(slot) is None
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_an_adapter_without_heads_has_none() -> None:
    pool = make_pool()
    assert pool.turbo(load(pool, CanonicalAdapter("Tiny", "tiny", {"q": lora()}))) is None


def test_rows_that_move_together_take_their_heads_with_them() -> None:
    """Heads are freed in between until only together the free rows are enough for the next ones."""
    arena = torch.zeros(1 << 16)
    turbo, pages = TURBOS["parallel"], 0
    contents, layout = head_pages(turbo, torch.float32)
    pages = len(contents)
    pool = HeadPool(arena, 3 * pages)
    tables = pool.tables
    places = {slot: np.arange(pages) * 400 + slot * pages * 400 for slot in range(4)}
    for slot in range(3):
        pool.add(slot, layout, places[slot])
        pool.publish(slot)
    larger = replace(layout, matrices=np.append(layout.matrices, [[pages, pages + 1]], axis=0))
    for slot in (0, 2):
        pool.remove(slot)
    pool.add(3, larger, np.append(places[3], 7))
    pool.publish(3)
    assert pool.tables is tables
    pool.check_integrity()
    for slot, matrices, offsets in ((1, layout, places[1]), (3, larger, [*places[3], 7])):
        found = pool.turbo(slot)
        assert found is not None
        first = found.heads[0][0]
        for number, (begin, end) in enumerate(matrices.matrices.tolist()):
            at, until = tables.matrices[first + number].tolist()
            assert tables.pages[at:until].tolist() == list(offsets[begin:end])


def test_tables_stay_level_over_many_heads() -> None:
    pool, turbo = make_pool(1 << 18), TURBOS["own LM heads"]
    slots = [load(pool, turbo_adapter(turbo)) for _ in range(3)]
    tables = pool.heads
    for _ in range(100):
        pool.free(slots.pop(0))
        slots.append(load(pool, turbo_adapter(turbo)))
    assert pool.heads is tables
    for slot in slots:
        check_bits(pool, slot, turbo)


def test_heads_fill_the_budget_and_their_pages_serve_updates_afterwards() -> None:
    pool = make_pool(1 << 18)
    image, slots = image_of(turbo_adapter(TURBOS["parallel"])), []
    while (slot := pool.allocate(image)) is not None:
        slots.append(slot)
    assert pool.used_bytes > 0.85 * (1 << 18)
    for slot in slots:
        pool.free(slot)
    loras = image_of(CanonicalAdapter("Tiny", "tiny", {"q": lora(8)}))
    filled = sum(1 for _ in iter(lambda: pool.allocate(loras), None))
    assert filled * loras.nbytes > 0.85 * (1 << 18)
    pool.check_integrity()


def test_heads_whose_pages_no_slab_holds_are_refused_with_the_setting() -> None:
    pool = make_pool(1 << 13)
    image = image_of(turbo_adapter(make_turbo(200, 1)))
    with pytest.raises(AdapterFailedError, match="adapter_device_bytes") as caught:
        pool.allocate(image)
    assert str(image.nbytes) in str(caught.value)
    assert str(1 << 13) in str(caught.value)


def test_a_pool_without_heads_has_small_tables() -> None:
    pool = make_pool()
    for _ in range(20):
        load(pool, CanonicalAdapter("Tiny", "tiny", {"q": lora()}))
    assert pool.heads.pages.nbytes + pool.heads.matrices.nbytes < pool.budget_bytes // 32


REFUSED = {
    "other hidden size": (make_turbo(HIDDEN + 1, 2), "from 22 features.*takes 21"),
    "token beyond": (make_turbo(HIDDEN, 2, vocabulary=(3, 101)), "token 101.*tokens 0 to 100"),
    "larger LM head": (make_turbo(HIDDEN, 2, own_outputs=102), "for 102 tokens, .* has 101"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_of_another_model_are_refused_with_what_to_do(name: str) -> None:
    turbo, says = REFUSED[name]
    with pytest.raises(AdapterFailedError, match=says) as caught:
        TurboShape(HIDDEN, 101).check(turbo)
    assert "again" in str(caught.value)


@pytest.mark.parametrize("vocabulary", [None, (0, 100)])
def test_heads_of_the_served_model_are_taken(vocabulary: tuple[int, ...] | None) -> None:
    columns = 100 if vocabulary is None else len(vocabulary)  # fewer than the model's 101
    turbo = make_turbo(HIDDEN, 2, own_outputs=columns, vocabulary=vocabulary)
    TurboShape(HIDDEN, 101).check(turbo)
