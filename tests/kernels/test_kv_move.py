"""kv_move_ against its reference, plain and native."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quickchange_kernels import native
from quickchange_kernels.kv_move import kv_move_, plain_kv_move_, reference_kv_move

Move = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@pytest.fixture(params=["plain", "native"])
def move(request: pytest.FixtureRequest) -> Move:
    if request.param == "plain":
        return plain_kv_move_
    if not native.ensure():
        pytest.skip("the native kernels can't be built here")
    return kv_move_


def random_caches(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(6, 3, 4, 20, generator=generator).to(dtype) for _ in range(2)]


def check(move: Move, caches: list[Tensor], source: Tensor, target: Tensor) -> None:
    expected = reference_kv_move(*caches, source, target)
    move(*caches, source, target)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 24])
def test_moves_read_every_source_before_they_write(
    count: int, dtype: torch.dtype, move: Move, generator: torch.Generator
) -> None:
    source, target = (torch.randperm(24, generator=generator)[:count] for _ in range(2))
    check(move, random_caches(generator, dtype), source, target)


def test_a_path_moves_down_over_itself(move: Move, generator: torch.Generator) -> None:
    check(move, random_caches(generator), torch.tensor([5, 6, 9, 11]), torch.tensor([4, 5, 6, 7]))


def test_padding_moves_nothing(move: Move, generator: torch.Generator) -> None:
    source, target = torch.tensor([2**40, 3, -1]), torch.tensor([-1, 7, -1])
    check(move, random_caches(generator), source, target)


def test_one_source_may_go_to_many_places(move: Move, generator: torch.Generator) -> None:
    check(move, random_caches(generator), torch.tensor([9, 9, 9]), torch.tensor([1, 9, 20]))


def test_slots_that_do_not_exist_are_refused(move: Move, generator: torch.Generator) -> None:
    for source, target in ((24, 0), (0, 24)):
        with pytest.raises(IndexError):
            move(*random_caches(generator), torch.tensor([source]), torch.tensor([target]))


def test_operands_that_do_not_fit_are_named(generator: torch.Generator) -> None:
    if not native.ensure():
        pytest.skip("the native kernels can't be built here")
    caches = random_caches(generator)
    with pytest.raises(ValueError, match=r"kv_move: .* do not fit together"):
        kv_move_(*caches, torch.tensor([1, 2]), torch.tensor([1]))
