"""lowrank_ and lowrank_embedding_ against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import POPULARITIES, draw_slots
from torch import Tensor

from quickchange_kernels.lowrank import lowrank_contract
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables, PageKind, Segments
from quickchange_kernels.lowrank.lowrank_plain import plain_lowrank_, plain_lowrank_embedding_
from quickchange_kernels.random_inputs import make_segments, random_tables

Run = Callable[[Tensor, Tensor, LowRankTables, Segments, int], None]
Close = Callable[[Tensor, Tensor], None]


def plain(y: Tensor, x: Tensor, tables: LowRankTables, segments: Segments, group: int) -> None:
    plain_lowrank_(y, x, *lowrank_contract.operands(tables, segments, group))


@pytest.fixture
def run(version: str) -> Run:
    return plain if version == "plain" else lowrank_contract.lowrank_


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns), float("nan"), dtype=dtype)


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("rank", [0, 1, 4, 8, 16, 64, 256])
def test_every_rank_matches_float64(
    rank: int, run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(96, [64], [rank, rank], generator, dtype=dtype)
    x = randn(7, 96, generator=generator, dtype=dtype)
    y = randn(7, 64, generator=generator, dtype=dtype)
    segments = make_segments([(0, 1, 1, 1.0), (2, 7, 0, 0.5)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_one_row_a_request_with_mixed_ranks_in_a_fused_group(
    popularity: str, rows: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    ranks = [16, 0, 8, 64, 3, 16, 5]
    tables = random_tables(80, [48, 16, 16], ranks, generator)
    slots = draw_slots(popularity, rows, len(ranks), generator)
    segments = make_segments([(t, t + 1, slot, 1.0) for t, slot in enumerate(slots)])
    x = randn(rows, 80, generator=generator)
    y = randn(rows, 80, generator=generator)
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


@pytest.mark.parametrize(("features", "width"), [(1, 1), (33, 7), (100, 130), (257, 515)])
def test_odd_sizes_match_float64(
    features: int,
    width: int,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    tables = random_tables(features, [width, width], [9, 16], generator, dtype=dtype)
    x = randn(20, features, generator=generator, dtype=dtype)
    y = randn(20, 2 * width, generator=generator, dtype=dtype)
    segments = make_segments([(0, 1, 0, 1.0), (1, 3, 1, 2.0), (3, 19, 0, -1.0)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


def test_long_prefill_segments_match_float64(
    run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(128, [64, 32], [16, 40], generator, dtype=dtype, bias=True)
    x = randn(300, 128, generator=generator, dtype=dtype)
    y = randn(300, 96, generator=generator, dtype=dtype)
    segments = make_segments([(0, 150, 0, 1.0), (150, 299, 1, 0.5), (299, 300, 0, 1.0)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


def test_a_composition_adds_several_adapters_over_the_same_rows(
    run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(64, [40], [8, 24, 5], generator, dtype=dtype)
    spans = [(0, 4, 0, 0.5), (0, 4, 1, 0.3), (2, 30, 2, -1.0), (0, 30, 1, 0.2), (0, 1, 0, 1.0)]
    x = randn(32, 64, generator=generator, dtype=dtype)
    y = randn(32, 40, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank(y, x, tables, make_segments(spans), 0)
    run(y, x, tables, make_segments(spans), 0)
    assert_close(y, expected)


def test_a_bias_is_a_rank_with_a_shift(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(32, [24], [0, 3], generator, bias=True)
    assert tables.page_shift.sum() == 2
    x = randn(3, 32, generator=generator)
    y = randn(3, 24, generator=generator)
    segments = make_segments([(0, 1, 0, 1.0), (1, 3, 1, 0.25)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


def test_each_group_takes_its_own_pages(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(32, [24], [8, 16], generator, groups=3)
    x = randn(2, 32, generator=generator)
    segments = make_segments([(0, 1, 0, 1.0), (1, 2, 1, 1.0)])
    for group in range(3):
        y = randn(2, 24, generator=generator)
        expected = lowrank_contract.reference_lowrank(y, x, tables, segments, group)
        run(y, x, tables, segments, group)
        assert_close(y, expected)


@pytest.mark.parametrize("long", [False, True])
def test_rows_in_no_segment_are_neither_read_nor_written(
    long: bool, run: Run, dtype: torch.dtype, generator: torch.Generator
) -> None:
    tables = random_tables(64, [32], [8, 0], generator, dtype=dtype)
    count = 40 if long else 2
    x = poisoned(count + 4, 64, dtype)
    y = poisoned(count + 4, 32, dtype)
    y[0] = -0.0
    x[2 : 2 + count] = randn(count, 64, generator=generator, dtype=dtype)
    y[2 : 2 + count] = 1
    before = y.clone()
    segments = make_segments([(2, 2 + count, 0, 1.0), (0, 1, 1, 1.0), (5, 5, 0, 1.0)])
    run(y, x, tables, segments, 0)
    inside = y[2 : 2 + count]
    assert torch.isfinite(inside).all()
    assert not torch.equal(inside, before[2 : 2 + count])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    outside = [0, 1, count + 2, count + 3]
    assert torch.equal(y[outside].view(bits), before[outside].view(bits))


def test_no_segments_leave_everything_untouched(run: Run, generator: torch.Generator) -> None:
    tables = random_tables(16, [16], [8], generator)
    y = poisoned(3, 16, torch.float32)
    run(y, poisoned(3, 16, torch.float32), tables, make_segments([]), 0)
    assert torch.isnan(y).all()


def test_columns_of_other_members_are_untouched(run: Run, generator: torch.Generator) -> None:
    tables = random_tables(16, [8], [8], generator)
    tables.pages[:, 2] = 4
    y = torch.zeros(2, 20)
    run(y, randn(2, 16, generator=generator), tables, make_segments([(0, 2, 0, 1.0)]), 0)
    assert torch.equal(y[:, :4], torch.zeros(2, 4))
    assert torch.equal(y[:, 12:], torch.zeros(2, 8))
    assert (y[:, 4:12] != 0).all()


@pytest.mark.parametrize("rows", [3, 60])
def test_inputs_and_outputs_may_be_column_slices(
    rows: int, run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(40, [24], [16], generator, dtype=dtype)
    x = randn(rows, 100, generator=generator, dtype=dtype)[:, 13:53]
    whole = randn(rows, 50, generator=generator, dtype=dtype)
    y = whole[:, 9:33]
    segments = make_segments([(0, rows, 0, 1.0)])
    expected = whole.double()
    expected[:, 9:33] = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(whole, expected)


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_an_embedding_adds_the_columns_of_its_tokens(
    rows: int, version: str, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    kinds = [PageKind.IDENTITY, PageKind.GAIN, PageKind.TANH]
    tables = random_tables(91, [48], [4, 20], generator, dtype=dtype, bias=True, kinds=kinds)
    ids = torch.randint(0, 91, (rows + 3,), generator=generator)
    spans = make_segments([(0, rows, 0, 1.0), (0, rows, 1, 0.5), (rows, rows + 1, 1, 1.0)])
    y = randn(rows + 3, 48, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank_embedding(y, ids, tables, spans, 0, 91)
    if version == "plain":
        plain_lowrank_embedding_(y, ids, *lowrank_contract.operands(tables, spans, 0), 91)
    else:
        lowrank_contract.lowrank_embedding_(y, ids, tables, spans, 0, 91)
    assert_close(y, expected)


@pytest.mark.parametrize("kind", [kind for kind in PageKind if kind != PageKind.IDENTITY])
@pytest.mark.parametrize("rows", [1, 60])
def test_a_page_does_what_its_kind_says(
    kind: PageKind,
    rows: int,
    run: Run,
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    tables = random_tables(32, [37, 24], [8, 20], generator, dtype=dtype, bias=True, kinds=[kind])
    x = randn(rows + 2, 32, generator=generator, dtype=dtype)
    y = randn(rows + 2, 61, generator=generator, dtype=dtype)
    segments = make_segments([(0, rows, 0, 1.0), (rows, rows + 2, 1, -0.5)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


def test_the_kinds_are_the_functions_they_are_named_after() -> None:
    tables = random_tables(1, [1], [8], torch.Generator(), kinds=[PageKind.IDENTITY])
    tables.arena.copy_(torch.nan_to_num(tables.arena))
    a, b, _, _ = tables.pages[0].tolist()
    tables.arena[a : a + 8], tables.arena[b : b + 8] = 0, 0
    tables.arena[a], tables.arena[b], tables.page_scale[0] = 1, 1, 1
    by_name = {
        PageKind.RELU: 0.0,
        PageKind.GELU: -0.158655,
        PageKind.GELU_TANH: -0.158808,
        PageKind.SILU: -0.268941,
        PageKind.TANH: -0.761594,
        PageKind.GAIN: 2.0,
    }
    segments = make_segments([(0, 1, 0, 1.0)])
    x, y = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    for kind, expected in by_name.items():
        tables.page_kind[0] = kind
        out = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
        assert out.item() - 2.0 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_pages_of_all_kinds_mix_and_gains_multiply_the_output_as_it_was(
    rows: int, run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(24, [70, 16], [40, 9, 12], generator, dtype=dtype, kinds=list(PageKind))
    spans = [(0, rows, 0, 1.0), (0, rows, 1, 0.5), (rows // 2, rows + 1, 2, 2.0)]
    x = randn(rows + 1, 24, generator=generator, dtype=dtype)
    y = randn(rows + 1, 86, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank(y, x, tables, make_segments(spans), 0)
    run(y, x, tables, make_segments(spans), 0)
    assert_close(y, expected)


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_an_adapter_may_read_the_output_that_it_adds_to(
    rows: int, run: Run, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    kinds = [PageKind.GELU, PageKind.IDENTITY, PageKind.GAIN]
    tables = random_tables(160, [160], [24, 8], generator, dtype=dtype, kinds=kinds)
    segments = make_segments([(0, rows, 0, 1.0), (0, rows, 1, 0.5)])
    y = randn(rows, 160, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank(y, y, tables, segments, 0)
    run(y, y, tables, segments, 0)
    assert_close(y, expected)


@pytest.mark.usefixtures("native_version")
def test_a_rows_result_does_not_depend_on_its_batch(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    tables = random_tables(200, [100, 37], [16, 40, 3], generator, dtype=dtype)
    x = randn(70, 200, generator=generator, dtype=dtype)
    y = randn(70, 137, generator=generator, dtype=dtype)
    together = y.clone()
    lowrank_contract.lowrank_(
        together, x, tables, make_segments([(0, 50, 1, 0.5), (50, 70, 0, 1.0)]), 0
    )
    for row, slot, weight in [(0, 1, 0.5), (33, 1, 0.5), (49, 1, 0.5), (50, 0, 1.0), (69, 0, 1.0)]:
        alone = y[row : row + 1].clone()
        segments = make_segments([(0, 1, slot, weight)])
        lowrank_contract.lowrank_(alone, x[row : row + 1], tables, segments, 0)
        assert torch.equal(alone[0], together[row])


@pytest.mark.usefixtures("native_version")
@pytest.mark.parametrize("rows", [40, 41])
def test_many_adapters_shared_out_by_rows_match_float64(
    rows: int, dtype: torch.dtype, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(600, [576, 90], [16, 8, 3], generator, dtype=dtype)
    spans = [(t, t + 1, t % 3, 0.5) for t in range(40)] + [(40, rows, 0, 1.0), (7, 9, 1, 2.0)]
    spans.sort(key=lambda span: -span[0] if rows == 41 else span[0])
    x = randn(rows, 600, generator=generator, dtype=dtype)
    y = randn(rows, 666, generator=generator, dtype=dtype)
    expected = lowrank_contract.reference_lowrank(y, x, tables, make_segments(spans), 0)
    lowrank_contract.lowrank_(y, x, tables, make_segments(spans), 0)
    assert_close(y, expected)


@pytest.mark.usefixtures("native_version")
def test_threads_do_not_change_the_result(generator: torch.Generator) -> None:
    tables = random_tables(96, [300, 100], [16, 64], generator)
    x = randn(9, 96, generator=generator)
    segments = make_segments([(0, 9, 0, 1.0), (2, 5, 1, 0.5), (2, 3, 0, 0.5)])
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = torch.zeros(9, 400)
        lowrank_contract.lowrank_(y, x, tables, segments, 0)
        results.append(y)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_bfloat16_pages_serve_float32_rows(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    tables = random_tables(70, [50], [16], generator, dtype=torch.bfloat16)
    x = randn(3, 70, generator=generator)
    y = randn(3, 50, generator=generator)
    segments = make_segments([(0, 3, 0, 1.0)])
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    run(y, x, tables, segments, 0)
    assert_close(y, expected)


@pytest.mark.usefixtures("native_version")
def test_a_dtype_without_a_native_version_goes_to_plain_torch(generator: torch.Generator) -> None:
    tables = random_tables(16, [8], [8], generator, dtype=torch.float16)
    x = randn(2, 16, generator=generator, dtype=torch.float16)
    segments = make_segments([(0, 2, 0, 1.0)])
    dispatched, expected = (torch.zeros(2, 8, dtype=torch.float16) for _ in range(2))
    lowrank_contract.lowrank_(dispatched, x, tables, segments, 0)
    plain(expected, x, tables, segments, 0)
    assert torch.equal(dispatched, expected)


@pytest.mark.usefixtures("native_version")
def test_bad_inputs_are_named(generator: torch.Generator) -> None:
    tables = random_tables(16, [8], [8], generator)
    x, y = torch.zeros(2, 16), torch.zeros(2, 8)
    segments = make_segments([(0, 2, 0, 1.0)])
    with pytest.raises(TypeError, match=r"x is Double, y is Float"):
        lowrank_contract.lowrank_(y, x.double(), tables, segments, 0)
    with pytest.raises(ValueError, match="y must be"):
        lowrank_contract.lowrank_(y.T, x, tables, segments, 0)
    with pytest.raises(IndexError, match="group 7"):
        lowrank_contract.lowrank_(y, x, replace(tables, shapes=tables.shapes * 8), segments, 7)
    wrong = Segments(segments.rows.long(), segments.slot, segments.weight)
    with pytest.raises(TypeError, match=r"segments\.rows must be contiguous Int"):
        lowrank_contract.lowrank_(y, x, tables, wrong, 0)


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.tuples(
            st.integers(0, 50),
            st.integers(0, 50),
            st.integers(0, 3),
            st.floats(-2, 2, allow_nan=False, width=32),
        ),
        max_size=12,
    ),
    seed=st.integers(0, 2**16),
)
def test_any_segments_match_float64(spans: list[tuple[int, int, int, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = random_tables(24, [20, 9], [0, 3, 8, 17], generator)
    segments = make_segments([(min(a, b), max(a, b), slot, w) for a, b, slot, w in spans])
    x = randn(50, 24, generator=generator)
    y = randn(50, 29, generator=generator)
    expected = lowrank_contract.reference_lowrank(y, x, tables, segments, 0)
    for version in (plain, lowrank_contract.lowrank_):
        out = y.clone()
        version(out, x, tables, segments, 0)
        assert (out.double() - expected).norm() <= 1e-5 * expected.norm()
