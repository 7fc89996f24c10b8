"""Which shape a decode step is padded to, and that padding changes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.adapters.batch_segments import unpack
from quickchange_server.engine.inputs.step_shapes import (
    Extent,
    PlanShape,
    StepBuckets,
    bucket_sizes,
    exact_extent,
)
from quickchange_server.engine.model_inputs import StepInputs, step_inputs
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.protocol import SamplingParams, Submit

BLOCK = 4
CPU = torch.device("cpu")


def fit(buckets: StepBuckets, plan: Seq[Scheduled]) -> Extent | None:
    return buckets.fit(PlanShape.of(plan))


def exact(plan: Seq[Scheduled]) -> StepInputs:
    shape = PlanShape.of(plan)
    return step_inputs(plan, shape, exact_extent(plan, shape, CPU), BLOCK)


Components = tuple[tuple[int, float], ...]


def item(
    computed: int, count: int, blocks: list[int], components: Components = (), more: int = 0
) -> Scheduled:
    """`count` rows of a sequence, after which `more` are still to be computed."""
    tokens = tuple(range(100, 100 + computed + count + more))
    sequence = Sequence(Submit("r", tokens, SamplingParams(max_tokens=9), seed=0), 0.0)
    sequence.computed, sequence.blocks = computed, blocks
    return Scheduled(sequence, count, components)


def decode(row: int, components: Components = ()) -> Scheduled:
    return item(row + 5, 1, list(range(row, row + -(-(row + 6) // BLOCK))), components)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 9, 16, 30, 64, 65, 100, 256])
def test_sizes_ascend_to_the_largest_and_pad_by_a_bounded_share(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for rows in range(1, most + 1):
        fitting = next(size for size in sizes if size >= rows)
        assert fitting < max(2 * rows, 8), f"{rows} rows padded to {fitting}"


def test_the_small_sizes_are_the_ones_that_kernels_are_tuned_for() -> None:
    assert bucket_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)


def test_the_smallest_bucket_with_room_is_taken() -> None:
    buckets = StepBuckets(16, 8)
    extent = fit(buckets, [decode(row) for row in range(5)])
    assert extent is not None
    assert (extent.rows, extent.sequences, extent.samples, extent.blocks) == (8, 8, 8, 8)
    assert extent.tokens_room is None


def test_a_step_that_verifies_drafts_takes_a_bucket_with_room_for_their_rows() -> None:
    plan = [replace(item(row + 5, 1, [row, 4, 5]), drafts=(7, 8)) for row in range(3)]
    extent = fit(StepBuckets(16, 8), plan)
    assert extent is not None
    assert extent.rows == 16  # nine are needed
    inputs = step_inputs(plan, PlanShape.of(plan), extent, BLOCK)
    assert inputs.ids[:9].tolist() == [105, 7, 8, 106, 7, 8, 107, 7, 8]
    assert inputs.positions[:9].tolist() == [5, 6, 7, 6, 7, 8, 7, 8, 9]
    assert inputs.sample_rows[:9].tolist() == list(range(9))
    assert inputs.query_start[:5].tolist() == [0, 3, 6, 9, 9]
    assert inputs.seq_lens[:4].tolist() == [8, 9, 10, 0]


def test_a_prefill_chunk_fits_no_bucket() -> None:
    buckets = StepBuckets(16, 8)
    assert fit(buckets, [decode(0), item(0, 3, [3])]) is None
    assert fit(buckets, [item(0, 1, [3], more=4)]) is None


def test_compositions_take_a_larger_bucket_or_none() -> None:
    buckets = StepBuckets(8, 8)
    three: Components = ((0, 1.0), (1, 0.5), (2, 0.25))
    small = fit(buckets, [decode(0, three)])
    assert small is not None
    assert small.rows == 4
    many: Components = tuple((slot, 1.0) for slot in range(9))
    assert fit(buckets, [decode(0, many)]) is None


def test_every_extent_is_offered_largest_first() -> None:
    extents = StepBuckets(9, 8).extents(adapters=True)
    assert [extent.rows for extent in extents] == [9, 8, 4, 2, 1]


def test_inputs_say_where_each_row_stands() -> None:
    plan = [item(6, 3, [7, 2, 5]), decode(1)]
    inputs = exact(plan)
    assert inputs.ids.tolist() == [106, 107, 108, 106]
    assert inputs.positions.tolist() == [6, 7, 8, 6]
    assert inputs.sample_rows.tolist() == [2, 3]
    batch = inputs
    assert batch.slots.tolist() == [2 * 4 + 2, 2 * 4 + 3, 5 * 4, 2 * 4 + 2]
    assert batch.tables.tolist() == [[7, 2, 5], [1, 2, 0]]
    assert batch.seq_lens.tolist() == [9, 7]
    assert batch.query_start.tolist() == [0, 3, 4]


def test_a_chunk_that_does_not_reach_the_end_samples_nothing() -> None:
    plan = [item(0, 3, [0], more=2)]
    assert exact(plan).sample_rows.numel() == 0


def test_segments_follow_the_rows_and_the_sampling_rows() -> None:
    plan = [item(0, 3, [0], ((4, 0.5),), more=2), decode(0, ((4, 0.5),)), decode(1, ((2, 1.0),))]
    inputs = exact(plan)
    assert inputs.tokens is not None
    assert inputs.samples is not None
    tokens = unpack(inputs.tokens.packed, inputs.tokens.room)
    samples = unpack(inputs.samples.packed, inputs.samples.room)
    assert (tokens.rows.tolist(), tokens.slot.tolist()) == ([[0, 4], [4, 5]], [4, 2])
    assert tokens.weight.tolist() == [0.5, 1.0]
    assert (samples.rows.tolist(), samples.slot.tolist()) == ([[0, 1], [1, 2]], [4, 2])


@given(rows=st.integers(0, 8), adapters=st.booleans())
def test_padding_only_appends_what_is_harmless(rows: int, adapters: bool) -> None:
    plan = [decode(row, ((row % 3, 1.0),) if adapters else ()) for row in range(rows)]
    extent = StepBuckets(8, 8).extents(adapters=adapters)[0]
    padded = step_inputs(plan, PlanShape.of(plan), extent, BLOCK)
    assert padded.ids.shape == padded.positions.shape == padded.sample_rows.shape == (8,)
    batch = padded
    assert batch.tables.shape == (8, 8)
    assert batch.slots[rows:].tolist() == [-1] * (8 - rows)
    assert batch.seq_lens[rows:].tolist() == [0] * (8 - rows)
    assert batch.query_start.tolist() == [min(row, rows) for row in range(9)]
    if rows:
        own = exact(plan)
        assert torch.equal(padded.ids[:rows], own.ids)
        assert torch.equal(batch.slots[:rows], own.slots)
        assert torch.equal(batch.seq_lens[:rows], own.seq_lens)
        width = own.tables.shape[1]
        assert torch.equal(batch.tables[:rows, :width], own.tables)
    assert padded.tokens is padded.samples
