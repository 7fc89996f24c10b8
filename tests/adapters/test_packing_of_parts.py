"""An adapter's parts, one for each process, give together what the whole gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_kernels.lowrank.lowrank_contract import Segments, reference_lowrank
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup, Shard, Spans
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

FEATURES, WIDTH, ROWS = 24, 48, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator)


def length(spans: Spans | None, whole: int) -> int:
    return whole if spans is None else sum(end - begin for begin, end in spans)


def chosen(x: torch.Tensor, spans: Spans | None) -> torch.Tensor:
    return x if spans is None else torch.cat([x[:, begin:end] for begin, end in spans], 1)


def adapted(
    update: LowRankUpdate, shard: Shard | None, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """y [T, n] of one process's part, with the part's updates of x [T, k]."""
    member = Member("m", 0, y.shape[1], shard)
    groups = (ModuleGroup(0, "linear", x.shape[1], y.shape[1], (member,)),)
    pool = DevicePool(groups, 1 << 20, torch.float32, torch.device("cpu"))
    shapes = page_shapes(groups, torch.float32)
    image = build_image(CanonicalAdapter("Tiny", "tiny", {"m": update}), shapes, torch.float32)
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    rows = torch.tensor([[0, ROWS]], dtype=torch.int32)
    segments = Segments(rows, torch.tensor([slot], dtype=torch.int32), torch.tensor([0.7]))
    return reference_lowrank(y, x, pool.tables, segments, 0)


def spans_of(rank: int, ranks: int, whole: int, pieces: int) -> Spans:
    piece, share = whole // pieces, whole // pieces // ranks
    begins = [number * piece + rank * share for number in range(pieces)]
    return tuple((begin, begin + share) for begin in begins)


updates = st.builds(
    lambda rank, bias, gain: LowRankUpdate(
        normal(rank, FEATURES),
        normal(WIDTH, rank),
        0.5,
        bias=normal(WIDTH, seed=1) if bias else None,
        gain=normal(WIDTH, seed=2) if gain else None,
    ),
    st.integers(0, 19),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(updates, st.sampled_from([2, 3, 4]), st.sampled_from([1, 2]), st.booleans())
def test_parts_give_together_what_the_whole_gives(
    update: LowRankUpdate, ranks: int, pieces: int, by_inputs: bool
) -> None:
    x, base = normal(ROWS, FEATURES), normal(FEATURES, WIDTH, seed=3)
    whole = adapted(update, None, x, x @ base)
    together = torch.zeros_like(whole)
    for rank in range(ranks):
        own = spans_of(rank, ranks, FEATURES if by_inputs else WIDTH, pieces)
        inputs, outputs = (own, None) if by_inputs else (None, own)
        shard = Shard(FEATURES, WIDTH, inputs, outputs, first=rank == 0)
        x_own = chosen(x, inputs)
        y_own = x_own @ chosen(chosen(base, outputs).T, inputs).T
        part = adapted(update, shard, x_own, y_own)
        if by_inputs:
            together += part
        else:
            columns = chosen(torch.arange(WIDTH)[None], outputs)[0]
            together[:, columns] = part
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [{"activation": "relu"}, {"shift": normal(4)}])
def test_an_update_that_can_not_be_cut_with_its_inputs_is_refused(part: dict[str, object]) -> None:
    update = LowRankUpdate(normal(4, FEATURES), normal(WIDTH, 4), 1.0, **part)  # type: ignore[arg-type]
    shard = Shard(FEATURES, WIDTH, inputs=((0, 12),), first=True)
    with pytest.raises(AdapterFailedError, match=r"m: .*--tensor-parallel 1"):
        adapted(update, shard, normal(ROWS, 12), normal(ROWS, WIDTH))


def test_an_update_of_other_sizes_is_refused_by_those_of_the_whole_module() -> None:
    update = LowRankUpdate(normal(4, 12), normal(WIDTH, 4), 1.0)
    shard = Shard(FEATURES, WIDTH, inputs=((0, 12),), first=True)
    with pytest.raises(AdapterFailedError, match=f"12 to {WIDTH} .* {FEATURES} to {WIDTH}"):
        adapted(update, shard, normal(ROWS, 12), normal(ROWS, WIDTH))
