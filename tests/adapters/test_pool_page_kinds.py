"""Pages with an activation, a gain, or of a group behind a sub-layer: what they hold and cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from quickchange_kernels.lowrank.lowrank_contract import Segments, reference_lowrank
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.canonical_adapter import (
    Activation,
    CanonicalAdapter,
    LowRankUpdate,
)

WIDTH = 21
GROUPS = (
    ModuleGroup(0, "linear", 13, 26, (Member("q", 0, WIDTH), Member("k", WIDTH, 5))),
    ModuleGroup(1, "linear", 18, WIDTH, (Member("o", 0, WIDTH),)),
    ModuleGroup(2, "linear", WIDTH, WIDTH, (Member("o", 0, WIDTH),), "output"),
)
FUNCTIONS = {
    "identity": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def image_of(dtype: torch.dtype = torch.float32, **updates: LowRankUpdate) -> AdapterImage:
    adapter = CanonicalAdapter("Tiny", "tiny", updates)
    return build_image(adapter, page_shapes(GROUPS, dtype), dtype)


def make_pool(budget: int = 1 << 20) -> DevicePool:
    return DevicePool(GROUPS, budget, torch.float32, torch.device("cpu"))


def load(pool: DevicePool, image: AdapterImage) -> int:
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    return slot


def added(
    pool: DevicePool, slot: int, group: int, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What the arena's content adds to y, by the kernels' reference, at weight 0.7."""
    rows = torch.tensor([[0, len(y)]], dtype=torch.int32)
    segments = Segments(rows, torch.tensor([slot], dtype=torch.int32), torch.tensor([0.7]))
    return reference_lowrank(y, x, pool.tables, segments, group) - y


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def bottleneck(rank: int, activation: Activation) -> LowRankUpdate:
    return LowRankUpdate(
        normal(rank, WIDTH),
        normal(WIDTH, rank),
        0.5,
        bias=-normal(WIDTH).abs(),  # an activation would change it
        activation=activation,
        source="output",
        shift=normal(rank),
    )


def gained(path: str, rank: int = 0) -> LowRankUpdate:
    width = {"q": WIDTH, "k": 5}[path]
    return LowRankUpdate(normal(rank, 13), normal(width, rank), 2.0, gain=1 + normal(width))


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("rank", [3, 8, 19])
def test_a_bottleneck_is_computed_with_its_shift_and_its_bias(
    activation: Activation, rank: int
) -> None:
    pool, update = make_pool(), bottleneck(rank, activation)
    slot = load(pool, image_of(o=update))
    y = normal(4, WIDTH)
    assert update.shift is not None
    assert update.bias is not None
    h = FUNCTIONS[activation](y @ update.a.T + update.shift)
    expected = 0.7 * (0.5 * h @ update.b.T + update.bias)
    torch.testing.assert_close(added(pool, slot, 2, y, y).float(), expected)
    assert not added(pool, slot, 1, y, normal(4, 18)).any()  # the input's group has none of it
    pool.check_integrity()


@pytest.mark.parametrize("rank", [0, 5, 9])
def test_a_gain_scales_the_output_of_its_own_columns(rank: int) -> None:
    pool, update = make_pool(), gained("k", rank)
    slot = load(pool, image_of(k=update, q=dataclasses.replace(gained("q"), gain=None)))
    y, x = normal(4, 26), normal(4, 13)
    assert update.gain is not None
    expected = torch.zeros(4, 26)
    own = (update.gain - 1) * y[:, WIDTH:] + 2.0 * (x @ update.a.T) @ update.b.T
    expected[:, WIDTH:] = 0.7 * own
    torch.testing.assert_close(added(pool, slot, 0, y, x).float(), expected)


def test_a_gain_costs_its_row_alone() -> None:
    image = image_of(q=gained("q"))
    assert image.pages == 1
    assert image.nbytes == 128  # 21 float32, in units of 64 bytes
    pool = make_pool()
    load(pool, image)
    assert pool.used_bytes == 128


def test_a_short_dtype_holds_a_gain_near_one() -> None:
    update = dataclasses.replace(gained("q"), gain=torch.full((WIDTH,), 1.0007))
    image = image_of(torch.bfloat16, q=update)
    torch.testing.assert_close(
        image.data[:WIDTH].float(), torch.full((WIDTH,), 0.0007), rtol=4e-3, atol=0
    )


def test_groups_behind_sublayers_are_called_in_steps_with_an_adapter_that_has_pages_there() -> None:
    pool = make_pool()
    plain = load(pool, image_of(q=gained("q", 8)))
    assert pool.tables_of([plain]).shapes[2].most_pages == 0
    slot = load(pool, image_of(o=bottleneck(8, "relu")))
    assert pool.tables_of([plain, slot]).shapes[2].most_pages == 2
    assert pool.tables_of([plain]) is pool.tables
    assert pool.tables.shapes[2].most_pages == 0
    pool.free(slot)
    again = load(pool, image_of(q=gained("q", 8)))
    assert again == slot
    assert pool.tables_of([again]) is pool.tables


def test_what_the_model_can_not_read_is_named() -> None:
    update = dataclasses.replace(bottleneck(2, "relu"), source="stream")
    with pytest.raises(AdapterFailedError, match=r"o: .*stream"):
        image_of(o=update)


@pytest.mark.parametrize("budget", [1 << 16, 100_001, 123_456, (1 << 20) + 4])
def test_every_page_begins_at_a_multiple_of_64_bytes_whatever_the_budget(budget: int) -> None:
    pool = make_pool(budget)
    while True:
        image = image_of(q=gained("q", 9), k=gained("k", 3), o=bottleneck(8, "relu"))
        slot = pool.allocate(image)
        if slot is None:
            break
    offsets = pool.tables.pages[:, :2][pool.tables.pages[:, 3] > 0]
    assert len(offsets) > 6
    assert not (offsets * 4 % 64).any()
    pool.check_integrity()
