"""The operations as PyTorch's tracing machinery sees them, and the samples that the tests draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_batches import POPULARITIES, draw_slots
from torch import Tensor

from quickchange_kernels.attention import kv_write  # noqa: F401  declares it
from quickchange_kernels.attention.paged_attention_contract import paged_attention
from quickchange_kernels.elementwise import (
    rms_norm,  # noqa: F401
    rotary,  # noqa: F401
    silu_mul,  # noqa: F401  declare them
)
from quickchange_kernels.linear.linear_float import linear
from quickchange_kernels.lowrank.lowrank_contract import RANKS_PER_PAGE
from quickchange_kernels.lowrank.lowrank_contract import operands as lowrank_operands
from quickchange_kernels.random_inputs import make_segments, random_keys, random_tables

CHECKS = ["test_schema", "test_faketensor"]


@pytest.fixture
def operands(generator: torch.Generator) -> dict[str, tuple[object, ...]]:
    tables = random_tables(12, [8], [4], generator)
    segments = make_segments([(0, 2, 0, 1.0)])
    lowrank = lowrank_operands(replace(tables, arena=tables.arena.nan_to_num()), segments, 0)
    keys = random_keys([16], 1, 8, 16, generator)
    k_cache, v_cache = keys.k_cache.nan_to_num(), keys.v_cache.nan_to_num()
    k = torch.randn(1, 1, 8, generator=generator)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    paged = (k_cache, v_cache, keys.block_tables, keys.seq_lens, starts, 1.0)
    return {
        "linear": (torch.randn(2, 12), torch.randn(8, 12), torch.randn(8)),
        "linear_panels": (torch.randn(2, 12), torch.randn(16 * 12), 8, torch.randn(8)),
        "lowrank_": (torch.zeros(2, 8), torch.randn(2, 12), *lowrank),
        "lowrank_embedding_": (torch.zeros(2, 8), torch.tensor([3, 11]), *lowrank, 12),
        "kv_write_": (k, k, k_cache, v_cache, torch.tensor([5])),
        "paged_attention": (torch.randn(1, 2, 8), *paged),
        "rms_norm": (torch.randn(2, 3, 8), torch.randn(8), 1e-5),
        "silu_mul": (torch.randn(2, 3, 8),),
    }


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear_panels",
        "lowrank_",
        "lowrank_embedding_",
        "kv_write_",
        "paged_attention",
        "rms_norm",
        "silu_mul",
    ],
)
@pytest.mark.parametrize("overload", ["default", "plain"])
def test_schemas_and_fake_versions_agree_with_what_runs(
    name: str, overload: str, operands: dict[str, tuple[object, ...]]
) -> None:
    operation = getattr(getattr(torch.ops.quickchange, name), overload)
    torch.library.opcheck(operation, operands[name], test_utils=CHECKS)


def test_shapes_are_known_without_computing() -> None:
    x, weight = torch.empty(5, 7, 16, device="meta"), torch.empty(9, 16, device="meta")
    assert linear(x, weight).shape == (5, 7, 9)
    q, cache = (torch.empty(shape, device="meta") for shape in ((3, 4, 8), (2, 2, 16, 8)))
    tables: list[Tensor] = [torch.empty(n, dtype=torch.int32, device="meta") for n in (1, 1, 2)]
    assert paged_attention(q, cache, cache, *tables, 1.0).shape == (3, 4, 8)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularities_draw_existing_slots(popularity: str, generator: torch.Generator) -> None:
    slots = draw_slots(popularity, 50, 7, generator)
    assert len(slots) == 50
    assert set(slots) <= set(range(7))


def test_popularities_differ_in_how_much_is_shared(generator: torch.Generator) -> None:
    distinct = {name: len(set(draw_slots(name, 64, 64, generator))) for name in POPULARITIES}
    assert distinct["identical"] == 1
    assert distinct["distinct"] == 64
    assert distinct["zipf"] < distinct["uniform"]
    assert distinct["skewed"] < distinct["uniform"]


def test_an_adapter_takes_one_page_for_every_eight_ranks(generator: torch.Generator) -> None:
    tables = random_tables(16, [8, 8], [0, 1, 8, 9], generator)
    pages = (tables.directory[:, 0, 1] - tables.directory[:, 0, 0]).tolist()
    assert pages == [0, 2, 2, 4]
    assert (tables.page_shift == 0).all()
    assert tables.page_shift.shape[1] == RANKS_PER_PAGE
