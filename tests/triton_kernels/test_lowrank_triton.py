"""lowrank_ and lowrank_embedding_ in Triton against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest
import torch
from random_batches import draw_slots
from torch import Tensor

from quickchange_kernels.lowrank import lowrank_contract
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, PageKind, RowTiles, Segments
from quickchange_kernels.lowrank.lowrank_triton import launch_lowrank, launch_lowrank_embedding
from quickchange_kernels.random_inputs import make_segments, random_tables

Close = Callable[[Tensor, Tensor], None]
Sanitized = Callable[..., AbstractContextManager[None]]
Holder = TypeVar("Holder", LowRankTables, Segments, RowTiles)
ACTIVATIONS = [kind for kind in PageKind if kind not in (PageKind.IDENTITY, PageKind.GAIN)]


def moved(holder: Holder, device: torch.device) -> Holder:
    """The same with its tensors on the device."""
    fields = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    tensors = {name: v.to(device) for name, v in fields.items() if isinstance(v, Tensor)}
    tiles = {name: moved(v, device) for name, v in fields.items() if isinstance(v, RowTiles)}
    return dataclasses.replace(holder, **tensors, **tiles)


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs on the CPU; `launch` runs the Triton version on them."""

    y: Tensor
    x: Tensor
    tables: LowRankTables
    segments: Segments
    group: int = 0

    @property
    def expected(self) -> Tensor:
        return lowrank_contract.reference_lowrank(
            self.y, self.x, self.tables, self.segments, self.group
        )

    def launch(self, device: torch.device) -> Tensor:
        """y afterwards, on the CPU."""
        y, x = (tensor.clone().to(device) for tensor in (self.y, self.x))
        tables, segments = moved(self.tables, device), moved(self.segments, device)
        launch_lowrank(y, x, *lowrank_contract.operands(tables, segments, self.group))
        return y.cpu()


def problem(
    generator: torch.Generator,
    tables: LowRankTables,
    spans: Sequence[tuple[int, int, int, float]],
    rows: int,
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """sizes: features of x and of y. Rows in no segment are NaN."""
    x, y = (torch.full((rows, size), float("nan"), dtype=dtype) for size in sizes)
    for begin, end, _, _ in spans:
        x[begin:end] = randn(end - begin, sizes[0], generator=generator, dtype=dtype)
        y[begin:end] = randn(end - begin, sizes[1], generator=generator, dtype=dtype)
    return Problem(y, x, tables, make_segments(spans))


def check(problem: Problem, device: torch.device, assert_close: Close) -> None:
    out, expected = problem.launch(device), problem.expected
    covered = ~torch.isnan(problem.y[:, 0])
    assert_close(out[covered], expected[covered])
    assert torch.isnan(out[~covered]).all()


def test_mixed_ranks_in_one_launch_match_float64(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(96, [64], [0, 1, 4, 8, 16, 64, 256], generator, dtype=dtype)
    spans = [(slot, slot + 1, slot, 0.5 + slot) for slot in range(7)]
    check(problem(generator, tables, spans, 9, (96, 64), dtype), device, assert_close)


@pytest.mark.parametrize("popularity", ["identical", "zipf"])
def test_one_row_a_request_in_a_fused_group(
    popularity: str, device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    ranks = [16, 0, 8, 24, 3]
    tables = random_tables(80, [48, 16, 16], ranks, generator)
    slots = draw_slots(popularity, 12, len(ranks), generator)
    spans = [(t, t + 1, slot, 1.0) for t, slot in enumerate(slots)]
    check(problem(generator, tables, spans, 12, (80, 80)), device, assert_close)


@pytest.mark.parametrize(("features", "width"), [(1, 1), (33, 7), (100, 130)])
def test_odd_sizes_match_float64(
    features: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    tables = random_tables(features, [width, width], [9, 16], generator, dtype=dtype)
    spans = [(0, 1, 0, 1.0), (1, 3, 1, 2.0), (3, 17, 0, -1.0)]
    check(problem(generator, tables, spans, 18, (features, 2 * width), dtype), device, assert_close)


def test_long_prefill_segments_match_float64(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(128, [64, 32], [16, 40], generator, dtype=dtype, bias=True)
    spans = [(0, 70, 0, 1.0), (70, 80, 1, 0.5), (80, 81, 0, 1.0)]
    check(problem(generator, tables, spans, 82, (128, 96), dtype), device, assert_close)


def test_many_features_are_summed_in_parts(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(2600, [16], [8], generator, dtype=dtype)
    check(problem(generator, tables, [(0, 3, 0, 1.0)], 3, (2600, 16), dtype), device, assert_close)


def test_a_composition_and_overlapping_segments_add_up(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(64, [40], [8, 24, 5], generator, dtype=dtype)
    spans = [(0, 4, 0, 0.5), (0, 4, 1, 0.3), (2, 30, 2, -1.0), (0, 30, 1, 0.2), (0, 1, 0, 1.0)]
    check(problem(generator, tables, spans, 32, (64, 40), dtype), device, assert_close)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_stands_between_a_and_b(
    kind: PageKind, device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(32, [24], [8, 20], generator, bias=True, kinds=[kind])
    spans = [(0, 2, 0, 1.0), (2, 5, 1, -0.5)]
    check(problem(generator, tables, spans, 5, (32, 24)), device, assert_close)


@pytest.mark.parametrize("rows", [3, 40])
def test_pages_of_all_kinds_mix(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    kinds = list(PageKind)
    tables = random_tables(32, [24, 16], [40, 9], generator, dtype=dtype, kinds=kinds)
    spans = [(0, rows, 0, 1.0), (0, rows, 1, 0.5)]
    check(problem(generator, tables, spans, rows + 1, (32, 40), dtype), device, assert_close)


def test_several_gains_of_a_row_all_multiply_the_output_as_it_was(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(8, [24], [8, 8], generator, kinds=[PageKind.GAIN])
    spans = [(0, 2, 0, 1.0), (0, 2, 1, 3.0)]
    check(problem(generator, tables, spans, 2, (8, 24)), device, assert_close)


@pytest.mark.parametrize("rows", [3, 40])
def test_an_adapter_may_read_the_output_that_it_adds_to(
    rows: int, device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    kinds = [PageKind.GELU, PageKind.IDENTITY, PageKind.GAIN]
    tables = moved(random_tables(160, [160], [24], generator, kinds=kinds), device)
    segments = make_segments([(0, rows, 0, 1.0)])
    y = randn(rows, 160, generator=generator)
    expected = lowrank_contract.reference_lowrank(
        y, y, moved(tables, torch.device("cpu")), segments, 0
    )
    y = y.to(device)
    launch_lowrank(y, y, *lowrank_contract.operands(tables, moved(segments, device), 0))
    assert_close(y.cpu(), expected)


def test_each_group_takes_its_own_pages(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(32, [24], [8, 16], generator, groups=2)
    spans = [(0, 1, 0, 1.0), (1, 2, 1, 1.0)]
    inputs = problem(generator, tables, spans, 2, (32, 24))
    for group in range(2):
        check(dataclasses.replace(inputs, group=group), device, assert_close)


def test_rows_under_an_adapter_without_pages_keep_their_bits(
    device: torch.device, generator: torch.Generator
) -> None:
    tables = random_tables(16, [16], [8, 0], generator)
    inputs = problem(generator, tables, [(0, 1, 0, 1.0), (1, 2, 1, 1.0)], 2, (16, 16))
    inputs.y[1] = -0.0
    out = inputs.launch(device)
    assert torch.equal(out[1].view(torch.int32), inputs.y[1].view(torch.int32))
    assert not torch.equal(out[0], inputs.y[0])


def test_columns_of_other_members_are_untouched(
    device: torch.device, generator: torch.Generator
) -> None:
    tables = random_tables(16, [8], [8], generator)
    tables.pages[:, 2] = 4
    tables = dataclasses.replace(tables, shapes=(lowrank_contract.GroupShape(2, aligned=False),))
    x = randn(2, 16, generator=generator)
    out = Problem(torch.zeros(2, 20), x, tables, make_segments([(0, 2, 0, 1.0)])).launch(device)
    assert torch.equal(out[:, :4], torch.zeros(2, 4))
    assert torch.equal(out[:, 12:], torch.zeros(2, 8))
    assert (out[:, 4:12] != 0).all()


@pytest.mark.parametrize("rows", [3, 40])
def test_inputs_and_outputs_may_be_column_slices(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    tables = random_tables(40, [24], [16], generator, dtype=dtype)
    segments = make_segments([(0, rows, 0, 1.0)])
    x = randn(rows, 100, generator=generator, dtype=dtype)[:, 13:53]
    whole = randn(rows, 50, generator=generator, dtype=dtype)
    expected = whole.double()
    expected[:, 9:33] = lowrank_contract.reference_lowrank(whole[:, 9:33], x, tables, segments, 0)
    whole = whole.to(device)
    x = randn(rows, 100, generator=generator, dtype=dtype).to(device)[:, 13:53].copy_(x)
    operands = lowrank_contract.operands(moved(tables, device), moved(segments, device), 0)
    launch_lowrank(whole[:, 9:33], x, *operands)
    assert_close(whole.cpu(), expected)


def test_bfloat16_pages_serve_float32_rows(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(72, [56], [16], generator, dtype=torch.bfloat16)
    check(problem(generator, tables, [(0, 3, 0, 1.0)], 3, (72, 56)), device, assert_close)


@pytest.mark.parametrize("rows", [2, 20])
def test_an_embedding_adds_the_columns_of_its_tokens(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    kinds = [PageKind.IDENTITY, PageKind.GAIN, PageKind.TANH]
    tables = random_tables(91, [48], [4, 20], generator, dtype=dtype, bias=True, kinds=kinds)
    ids = torch.randint(0, 91, (rows + 3,), generator=generator)
    segments = make_segments([(0, rows, 0, 1.0), (0, rows, 1, 0.5), (rows, rows + 1, 1, 1.0)])
    y = randn(rows + 3, 48, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank_embedding(y, ids, tables, segments, 0, 91)
    y, ids = y.to(device), ids.to(device)
    operands = lowrank_contract.operands(moved(tables, device), moved(segments, device), 0)
    launch_lowrank_embedding(y, ids, *operands, 91)
    assert_close(y.cpu(), expected)


def padded(table: Tensor, rows: int) -> Tensor:
    return torch.cat([table, table.new_zeros(rows, table.shape[1])])


def test_padding_of_tiles_and_pieces_is_harmless(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(64, [40], [8, 24], generator)
    inputs = problem(generator, tables, [(0, 4, 0, 0.5), (2, 6, 1, 0.3)], 8, (64, 40))
    tiles = inputs.segments.tiles
    assert tiles is not None
    roomy = RowTiles(padded(tiles.pieces, 3), padded(tiles.tiles, 2), tiles.height)
    segments = dataclasses.replace(inputs.segments, tiles=roomy)
    check(dataclasses.replace(inputs, segments=segments), device, assert_close)


def test_a_larger_most_pages_changes_no_bit(
    device: torch.device, generator: torch.Generator
) -> None:
    tables = random_tables(64, [40], [8, 24], generator)
    inputs = problem(generator, tables, [(0, 4, 0, 0.5), (2, 6, 1, 0.3)], 6, (64, 40))
    larger = dataclasses.replace(tables, shapes=(lowrank_contract.GroupShape(32, aligned=True),))
    assert torch.equal(
        inputs.launch(device), dataclasses.replace(inputs, tables=larger).launch(device)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_result_does_not_depend_on_its_batch(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    tables = random_tables(1500, [32, 16], [16, 40], generator, dtype=dtype)
    spans = [(0, 20, 1, 0.5), (20, 23, 0, 1.0)]
    inputs = problem(generator, tables, spans, 23, (1500, 48), dtype)
    together = inputs.launch(device)
    for row, slot, weight in [(0, 1, 0.5), (19, 1, 0.5), (21, 0, 1.0)]:
        own = slice(row, row + 1)
        alone = Problem(inputs.y[own], inputs.x[own], tables, make_segments([(0, 1, slot, weight)]))
        difference = alone.launch(device)[0].double() - together[row].double()
        # The interpreter multiplies by a library that may order sums by the shape.
        assert difference.abs().max() <= (1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("rows", [3, 20])
def test_programs_stay_in_bounds_and_apart(
    rows: int, sanitized: Sanitized, device: torch.device, generator: torch.Generator
) -> None:
    tables = random_tables(40, [24, 7], [16, 9], generator, kinds=list(PageKind))
    spans = [(0, rows, 0, 1.0), (1, rows - 1, 1, 0.5)]
    inputs = problem(generator, tables, spans, rows, (40, 31))
    with sanitized():
        inputs.launch(device)


def test_what_a_launch_needs_is_named(device: torch.device, generator: torch.Generator) -> None:
    tables = moved(random_tables(16, [8], [8], generator), device)
    segments = moved(make_segments([(0, 2, 0, 1.0)]), device)
    x, y = torch.zeros(2, 16, device=device), torch.zeros(2, 8, device=device)
    operands = lowrank_contract.operands(tables, segments, 0)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        launch_lowrank(y, x.double(), *operands)
    with pytest.raises(ValueError, match="y must have"):
        launch_lowrank(y.T, x, *operands)
    untiled = lowrank_contract.operands(tables, dataclasses.replace(segments, tiles=None), 0)
    with pytest.raises(ValueError, match="no tiles"):
        launch_lowrank(y, x, *untiled)


def test_the_operation_dispatches_to_triton(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(16, [8], [8], generator)
    segments = make_segments([(0, 2, 0, 1.0)])
    x, y = randn(2, 16, generator=generator), randn(2, 8, generator=generator)
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    y = y.to(device)
    lowrank_contract.lowrank_(y, x.to(device), moved(tables, device), moved(segments, device), 0)
    assert_close(y.cpu(), expected)
