"""What stays from step to step gives the inputs that are made from scratch, whatever changes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import Segments
from quickchange_server.adapters.batch_segments import Stretches, unpack
from quickchange_server.engine.inputs.block_tables import TableChanges, TableRows
from quickchange_server.engine.inputs.sample_tables import (
    COLUMNS,
    BatchTables,
    SampleRow,
    tables_of,
)
from quickchange_server.engine.inputs.step_shapes import (
    Extent,
    PlanShape,
    StepBuckets,
    exact_extent,
)
from quickchange_server.engine.model_inputs import (
    InputWriter,
    StepInputs,
    empty_inputs,
    step_inputs,
)
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.model.input_buffers import StaticInputs, layout_of
from quickchange_server.protocol import SamplingParams, Submit

CPU = torch.device("cpu")
BLOCK, ROWS, SEQUENCES, WIDTH, VOCABULARY = 4, 24, 4, 16, 50
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=99),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=99),
    SamplingParams(temperature=1.2, top_k=5, min_p=0.1, typical_p=0.5, max_tokens=99),
    SamplingParams(temperature=0.0, top_k=3, logprobs=2, max_tokens=99),
    SamplingParams(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=99),
    SamplingParams(logit_bias={3: 1.5}, min_tokens=9, stop_token_ids=[7], logprobs=0),
)
COMPOSITIONS = ((), ((0, 1.0),), ((1, 0.5),), ((0, 0.5), (2, -1.0)))
STRETCHES: tuple[Stretches, ...] = (  # of texts that are cut
    ((0, ()), (7, COMPOSITIONS[1])),
    ((0, COMPOSITIONS[3]), (1, COMPOSITIONS[2]), (2, ()), (9, COMPOSITIONS[3])),
    tuple((position, COMPOSITIONS[position % 4]) for position in range(WIDTH * BLOCK)),
)


class Batch:
    """Sequences that come, go on and leave, each with blocks of its own."""

    def __init__(self) -> None:
        self.sequences: list[tuple[Sequence, int]] = []  # and the number of its composition
        self._made = 0

    def change(self, data: st.DataObject) -> None:
        """Let one sequence leave, one come, one be preempted: each may happen or not."""
        if self.sequences and data.draw(st.booleans(), "one leaves"):
            self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        if len(self.sequences) < SEQUENCES and data.draw(st.booleans(), "one comes"):
            tokens = tuple(range(1, 1 + data.draw(st.integers(1, 12), "prompt")))
            params = data.draw(st.sampled_from(PARAMS))
            submit = Submit(str(self._made), tokens, params, seed=self._made * 7)
            kinds = len(COMPOSITIONS) + len(STRETCHES)
            kind = data.draw(st.integers(0, kinds - 1), "composition")
            self.sequences.append((Sequence(submit, 0.0), kind))
            self._made += 1
        if self.sequences and data.draw(st.booleans(), "one is preempted"):
            sequence, _ = data.draw(st.sampled_from(self.sequences))
            sequence.blocks, sequence.computed = [], 0

    def plan(self, data: st.DataObject) -> list[Scheduled]:
        plan = []
        room = ROWS - len(self.sequences)
        for sequence, kind in self.sequences:
            most = min(sequence.remaining, 1 + room)
            count = data.draw(st.integers(1, most), "rows")
            drafts: tuple[int, ...] = ()
            if count == sequence.remaining == 1 and room >= 2:
                drafts = (5,) * data.draw(st.integers(0, 2), "drafts")
            room -= count - 1 + len(drafts)
            end = sequence.computed + count + len(drafts)
            while len(sequence.blocks) * BLOCK < end:
                sequence.blocks.append(data.draw(st.integers(0, 63), "block"))
            cut: Stretches = ()
            if kind >= len(COMPOSITIONS):
                kind, cut = 0, STRETCHES[kind - len(COMPOSITIONS)]
            one = Scheduled(sequence, count, COMPOSITIONS[kind], drafts=drafts, stretches=cut)
            plan.append(one)
        plan.sort(key=lambda item: item.components)
        return plan

    def advance(self, plan: list[Scheduled]) -> None:
        for item in plan:
            item.sequence.computed += item.count
            if item.samples:
                item.sequence.tokens.append(item.sequence.computed % VOCABULARY)
        self.sequences = [
            (one, kind) for one, kind in self.sequences if len(one.tokens) < WIDTH * BLOCK - 4
        ]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tensors_that_are_written_again_and_again_equal_those_made_from_scratch(
    data: st.DataObject,
) -> None:
    batch = Batch()
    buckets = StepBuckets(8, WIDTH, SEQUENCES, ROWS)
    kept = TableRows(SEQUENCES, WIDTH, CPU)
    written: dict[Extent, tuple[StaticInputs[StepInputs], InputWriter]] = {}
    for adapters in (False, True):
        for extent in buckets.extents(adapters=adapters):
            one_kind = extent.all_sampled
            static = StaticInputs(empty_inputs(extent, kept=kept, one_kind=one_kind, fed=True), CPU)
            written[extent] = static, InputWriter(static.host, BLOCK)
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        batch.change(data)
        plan = batch.plan(data)
        shape = PlanShape.of(plan)
        extent = buckets.fit(shape)
        if not plan or extent is None:
            batch.advance(plan)
            continue
        static, writer = written[extent]
        writer.write(plan, shape)
        changes = static.host.tables
        assert isinstance(changes, TableChanges)
        kept.write([item.sequence.blocks for item in plan], changes)
        static.send(())
        found, expected = static.device, step_inputs(plan, shape, extent, BLOCK)
        for field in ("ids", "positions", "sample_rows", "slots", "seq_lens", "query_start"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field
        assert found.feed is not None
        assert found.feed.tolist() == [-1] * extent.rows
        tables = found.step(None, kept.tables).attention.block_tables
        for row, item in enumerate(plan):
            blocks = item.sequence.blocks
            assert tables[row, : len(blocks)].tolist() == blocks
        for field in ("tokens", "samples", "head"):
            own, fresh = getattr(found, field), getattr(expected, field)
            assert (own is None) == (fresh is None)
            if own is not None:
                assert torch.equal(own.packed, fresh.packed), field
        batch.advance(plan)


def taken(item: Scheduled, position: int) -> list[tuple[int, float]]:
    """What the row at a position takes."""
    found = item.components
    for first, components in item.stretches:
        found = components if first <= position else found
    return [*found]


def read(segments: Segments, rows: int) -> list[list[tuple[int, float]]]:
    """(slot, weight) of each row, in order."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
    parts = zip(
        segments.rows.tolist(), segments.slot.tolist(), segments.weight.tolist(), strict=True
    )
    for (begin, end), slot, weight in parts:
        for row in range(begin, end):
            found[row].append((slot, weight))
    return found


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_row_takes_what_its_position_says_in_each_shape_that_fits(
    data: st.DataObject,
) -> None:
    batch = Batch()
    buckets = StepBuckets(8, WIDTH, SEQUENCES, ROWS)
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        batch.change(data)
        plan = batch.plan(data)
        shape = PlanShape.of(plan)
        for extent in (buckets.fit(shape), exact_extent(plan, shape, CPU) if plan else None):
            if extent is None or extent.tokens_room is None:
                continue
            inputs = step_inputs(plan, shape, extent, BLOCK)
            assert inputs.tokens is not None
            assert inputs.samples is not None
            rows = [(item, item.first + row) for item in plan for row in range(item.rows)]
            sampled = [
                (item, item.first + row)
                for item in plan
                for row in range(item.rows - item.sampled_rows, item.rows)
            ]
            for packed, those in ((inputs.tokens, rows), (inputs.samples, sampled)):
                found = read(unpack(packed.packed, packed.room), len(those))
                assert found == [taken(*row) for row in those]
        batch.advance(plan)


def rows_of(item: Scheduled) -> list[SampleRow]:
    """The item's sampled rows, each with all its tokens."""
    request, known = item.sequence.request, [*item.sequence.tokens, *item.drafts]
    end, prompt = item.first + item.count, len(item.sequence.request.prompt)
    return [
        SampleRow(request.sampling, request.seed, at, known[:prompt], known[prompt:at])
        for at in range(end, end + item.sampled_rows)
    ]


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return torch.equal(found, expected)


@pytest.mark.parametrize("every", [False, True])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_sampling_tables_that_are_kept_equal_those_of_single_rows(
    every: bool, data: st.DataObject
) -> None:
    batch, kept = Batch(), BatchTables(VOCABULARY, every=every)
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        batch.change(data)
        plan = batch.plan(data)
        items = [item for item in plan if item.samples]
        found = kept.of(items)
        expected = tables_of([row for item in items for row in rows_of(item)], VOCABULARY)
        by_name = dict(zip(found.columns.names, found.columns.table.numpy(), strict=True))
        for name, column in zip(expected.columns.names, expected.columns.table, strict=True):
            assert np.array_equal(by_name[name], column.numpy()), name
        assert found.columns.names == (COLUMNS if every else expected.columns.names)
        assert found.rows == expected.rows
        assert [*found.wanted] == [*expected.wanted]
        assert same(found.asking, expected.asking)
        assert (found.edits is None) == (expected.edits is None)
        if found.edits is not None and expected.edits is not None:
            for field in fields(found.edits):
                assert same(getattr(found.edits, field.name), getattr(expected.edits, field.name))
        batch.advance(plan)


def test_more_changes_than_a_step_has_room_for_are_sent_ahead() -> None:
    kept = TableRows(2, 3000, CPU)
    changes = kept.no_changes(2)
    long, short = [*range(5, 2905)], [9, 8, 7]
    kept.write([long, short], changes)
    tables = changes.applied(kept.tables)
    assert tables[0, :2900].tolist() == long
    assert tables[1, :3].tolist() == short
    short.append(6)
    kept.write([short], changes)
    assert changes.applied(kept.tables)[0, :4].tolist() == short
    assert int((changes.places != 2 * 3000).sum()) == 1, "a block that was known is sent again"


def test_a_step_of_a_long_context_sends_no_more_than_a_short_one() -> None:
    """Tables of 64 sequences of up to 131,072 tokens would be two megabytes a step."""
    sizes = []
    for blocks in (128, 8192):
        extent = StepBuckets(64, blocks).extents(adapters=True)[0]
        inputs = empty_inputs(extent, kept=TableRows(64, blocks, CPU), fed=True)
        layout, _ = layout_of(inputs)
        sizes.append(layout.nbytes)
    assert sizes[0] == sizes[1] < 32 * 1024
