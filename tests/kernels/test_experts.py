"""lowrank_experts_ and linear_experts against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickchange_kernels import native
from quickchange_kernels.linear.linear_experts import (
    linear_experts,
    plain_linear_experts,
    reference_linear_experts,
)
from quickchange_kernels.lowrank import lowrank_contract
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, PageKind, Segments
from quickchange_kernels.lowrank.lowrank_plain import plain_lowrank_experts_
from quickchange_kernels.random_inputs import make_segments, random_tables

Run = Callable[[Tensor, Tensor, Tensor, int, LowRankTables, Segments, range], None]
Close = Callable[[Tensor, Tensor], None]


def plain(
    y: Tensor,
    x: Tensor,
    expert: Tensor,
    choices: int,
    tables: LowRankTables,
    segments: Segments,
    groups: range,
) -> None:
    given = lowrank_contract.operands_experts(tables, segments, groups)
    plain_lowrank_experts_(y, x, expert, choices, len(groups), *given)


@pytest.fixture
def run(version: str) -> Run:
    return plain if version == "plain" else lowrank_contract.lowrank_experts_


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def routed(tokens: int, choices: int, experts: int, generator: torch.Generator) -> Tensor:
    """Each token's experts, no two the same: int64 [tokens · choices]."""
    rows = [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize("shared", [True, False], ids=["x of tokens", "x of rows"])
@pytest.mark.parametrize(("features", "width"), [(33, 7), (96, 64), (130, 257)])
def test_every_row_takes_its_experts_pages(
    features: int,
    width: int,
    shared: bool,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    tokens, choices, experts = 23, 3, 5
    tables = random_tables(features, [width], [4, 0, 17], generator, groups=9, dtype=dtype)
    x = randn(tokens if shared else tokens * choices, features, generator=generator, dtype=dtype)
    y = randn(tokens * choices, width, generator=generator, dtype=dtype)
    segments = make_segments(
        [(0, 1, 0, 1.0), (1, 3, 1, 0.5), (3, 9, 2, -1.0), (12, 22, 0, 2.0), (12, 22, 2, 0.3)]
    )
    expert = routed(tokens, choices, experts, generator)
    groups = range(3, 3 + experts)
    expected = lowrank_contract.reference_lowrank_experts(
        y, x, expert, choices, tables, segments, groups.start
    )
    before = y.clone()
    run(y, x, expert, choices, tables, segments, groups)
    assert_close(y, expected)
    untouched = [*range(9 * choices, 12 * choices), *range(22 * choices, 23 * choices)]
    assert torch.equal(y[untouched], before[untouched])


def test_activations_and_shifts_are_an_experts_too(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    kinds = [kind for kind in PageKind if kind is not PageKind.GAIN]
    tables = random_tables(40, [24], [20, 9], generator, groups=4, kinds=kinds, bias=True)
    x, y = randn(8, 40, generator=generator), randn(16, 24, generator=generator)
    segments = make_segments([(0, 5, 0, 1.0), (5, 8, 1, 0.5)])
    expert = routed(8, 2, 4, generator)
    expected = lowrank_contract.reference_lowrank_experts(y, x, expert, 2, tables, segments, 0)
    run(y, x, expert, 2, tables, segments, range(4))
    assert_close(y, expected)


@pytest.mark.parametrize("place", ["expert", "slot", "rows"])
def test_what_is_out_of_range_is_refused_before_anything_is_written(
    place: str, run: Run, generator: torch.Generator
) -> None:
    tables = random_tables(16, [16], [8], generator, groups=3)
    x, y = randn(4, 16, generator=generator), randn(8, 16, generator=generator)
    expert = routed(4, 2, 3, generator)
    segments = make_segments([(0, 5 if place == "rows" else 4, 1 if place == "slot" else 0, 1.0)])
    if place == "expert":
        expert[7] = 3
    before = y.clone()
    with pytest.raises(IndexError, match=place):
        run(y, x, expert, 2, tables, segments, range(3))
    assert torch.equal(y, before)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_tokens_rows_do_not_depend_on_the_batch(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens, choices, experts = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4)), 6
    ranks = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    tables = random_tables(24, [40], ranks, generator, groups=experts)
    x = randn(tokens, 24, generator=generator)
    expert = routed(tokens, choices, experts, generator)
    weight = randn(experts, 40, 24, generator=generator)
    bias = randn(experts, 40, generator=generator)
    slots = [data.draw(st.integers(0, len(ranks) - 1)) for _ in range(tokens)]
    groups = range(experts)

    def outputs(chosen: list[int]) -> Tensor:
        rows = torch.cat([torch.arange(t * choices, (t + 1) * choices) for t in chosen])
        y = linear_experts(x[chosen], weight, bias, expert[rows])
        spans = [(i, i + 1, slots[t], 1.0) for i, t in enumerate(chosen)]
        lowrank_contract.lowrank_experts_(
            y, x[chosen], expert[rows], choices, tables, make_segments(spans), groups
        )
        return y.view(len(chosen), choices, 40)

    together = outputs(list(range(tokens)))
    alone = data.draw(st.integers(0, tokens - 1))
    if native.ensure():  # bitwise, which plain torch can't promise
        assert torch.equal(outputs([alone])[0], together[alone])
    else:
        assert torch.allclose(outputs([alone])[0], together[alone], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (1, 4), (13, 2), (90, 3)])
def test_each_row_goes_through_its_own_experts_linear(
    tokens: int,
    choices: int,
    bias: bool,
    turned: bool,
    version: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    experts, features, width = 7, 48, 56
    shape = (experts, features, width) if turned else (experts, width, features)
    weight = randn(*shape, generator=generator, dtype=dtype)
    weight = weight.transpose(1, 2) if turned else weight
    added = randn(experts, width, generator=generator, dtype=dtype) if bias else None
    x = randn(tokens, features, generator=generator, dtype=dtype)
    expert = routed(tokens, choices, experts, generator)
    operation = plain_linear_experts if version == "plain" else linear_experts
    y = operation(x, weight, added, expert)
    assert_close(y, reference_linear_experts(x, weight, added, expert))
    rows = x.repeat_interleave(choices, 0)
    assert torch.equal(operation(rows, weight, added, expert), y)


def test_an_expert_that_is_not_there_is_refused(native_version: str) -> None:
    del native_version
    weight, x = torch.randn(3, 8, 8), torch.randn(2, 8)
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="expert"):
            linear_experts(x, weight, None, torch.tensor([0, wrong]))


def test_the_native_sums_depend_on_the_features_alone(native_version: str) -> None:
    """Bitwise: a row alone, and among many for the same expert and others."""
    del native_version
    generator = torch.Generator().manual_seed(5)
    weight = randn(4, 48, 100, generator=generator)
    x = randn(70, 100, generator=generator)
    expert = torch.randint(0, 4, (70,), generator=generator)
    together = linear_experts(x, weight, None, expert)
    for row in (0, 17, 69):
        alone = linear_experts(x[row : row + 1], weight, None, expert[row : row + 1])
        assert torch.equal(alone[0], together[row])
