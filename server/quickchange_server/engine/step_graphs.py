"""Steps from captured graphs: the fixed shapes, the tensors that plans are written into, the runs.

A graph holds the forward pass and the sampling of rows whose tokens follow from the columns of
their parameters alone; what else a step's rows ask for goes up with its inputs and is computed
behind the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.engine.inputs.block_tables import TableChanges, TableRows
from quickchange_server.engine.inputs.sample_tables import SampleColumns
from quickchange_server.engine.inputs.state_inputs import one_row_each, state_parts
from quickchange_server.engine.inputs.step_shapes import Extent, PlanShape, StepBuckets
from quickchange_server.engine.model_inputs import InputWriter, StepInputs, empty_inputs
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.graphs.cuda_graphs import Capture, Graphs

Other = TypeVar("Other")

StepTree = tuple[StepInputs, SampleColumns]


class StepOutput(NamedTuple):
    """Output of a step's rows that are asked for."""

    logits: Tensor  # [R, V], of the rows that the LM head reads
    hidden: Tensor  # [R, H]
    picked: Tensor | None = None  # int64 [2, R]: tokens and soundness by the columns alone


# Outputs of inputs on the device: logits, hidden states, tokens and soundness of all rows. The
# tables: of adapters, and the block tables that the device keeps.
ComputeStep = Callable[[StepTree, LowRankTables | None, Tensor], tuple[Tensor, Tensor, Tensor]]


class _Written(NamedTuple):
    """The host's side of a graph's inputs."""

    step: StepInputs
    columns: npt.NDArray[np.float64]
    writer: InputWriter


class StepGraphs:
    """All graphs of one runner."""

    def __init__(
        self,
        buckets: StepBuckets,
        compute: ComputeStep,
        capture: Capture,
        device: torch.device,
        *,
        block_size: int,
        sequences: int,
        blocks: int,
        recurrent: bool,
        scaled: bool,
        tokens: Tensor,
        at_need: bool = False,
    ) -> None:
        """sequences: the most of a step. blocks: the most of a sequence. recurrent: the model has
        layers that keep states. scaled: it scales positions by the text's length. tokens: those
        sampled by the step before, which the next reads. at_need: a capture costs no more than the
        step, so that each waits until its step comes."""
        self._buckets = buckets
        self._device = device
        self._block_size = block_size
        self._recurrent = recurrent
        self._scaled = scaled
        self._at_need = at_need
        self._kept = TableRows(sequences, blocks, device)
        self._graphs = Graphs[StepTree](
            lambda inputs, tables: compute(inputs, tables, self._kept.tables),
            capture,
            device,
            tokens,
        )
        self._written: dict[Extent, _Written] = {}

    @property
    def captures(self) -> int:
        """Number of graphs captured so far, of those that are due before the first step."""
        return 0 if self._at_need else self._graphs.captures

    def warm_up(self, tables: LowRankTables | None) -> None:
        """Capture every graph for the adapters' tables; None: the graphs without adapters."""
        if self._at_need:
            return
        for extent in self._buckets.extents(adapters=tables is not None):
            self.write_nothing(extent)
            self._graphs.run(extent, tables, ())

    def fit(self, plan: Sequence[Scheduled], shape: PlanShape) -> Extent | None:
        """The shape of the graph that a plan runs from; None: it runs from none."""
        if self._recurrent and not one_row_each(plan):
            return None
        return self._buckets.fit(shape)

    def holding(self, rows: int) -> Extent | None:
        """The shape of the graph of a decode step of so many rows; None: there is none."""
        return self._buckets.holding(rows)

    def write(
        self, plan: Sequence[Scheduled], shape: PlanShape, extent: Extent, columns: SampleColumns
    ) -> None:
        """Write a plan and its sampling columns for the coming run; the last one written counts."""
        written = self._inputs(extent)
        written.writer.write(plan, shape)
        rows = shape.samples
        written.columns[:, :rows] = columns.table.numpy()
        written.columns[:, rows:] = 0.0
        if self._recurrent:
            (own,), (part,) = written.step.states, state_parts(plan, extent.rows, self._device)
            own.write.copy_(part.write)
            if own.read is not None and part.read is not None:
                own.read.copy_(part.read)

    def write_nothing(self, extent: Extent) -> None:
        """Write a step without sequences."""
        self.write((), PlanShape.of(()), extent, SampleColumns.greedy(0))

    def run(
        self,
        extent: Extent,
        plan: Sequence[Scheduled],
        tables: LowRankTables | None,
        others: Other,
    ) -> tuple[StepOutput, SampleColumns, Other]:
        """The outputs for the plan that was written, whole; its columns and `others` on the
        device."""
        step = self._inputs(extent).step
        if isinstance(step.tables, TableChanges):
            # Here, since what is written must run: it is then known to be on the device.
            self._kept.write([item.sequence.blocks for item in plan], step.tables)
        outputs, arrived = self._graphs.run(extent, tables, others)
        return StepOutput(*outputs), self._graphs.device_inputs(extent)[1], arrived

    def _inputs(self, extent: Extent) -> _Written:
        if extent not in self._written:
            step, columns = self._graphs.inputs(extent, lambda: self._empty(extent))
            writer = InputWriter(step, self._block_size)
            self._written[extent] = _Written(step, columns.table.numpy(), writer)
            self.write_nothing(extent)
            self._graphs.keep_blank(extent)
        return self._written[extent]

    def _empty(self, extent: Extent) -> StepTree:
        states = state_parts((), extent.rows, self._device) if self._recurrent else ()
        step = empty_inputs(
            extent,
            kept=self._kept,
            one_kind=extent.all_sampled,
            fed=True,
            scaled=self._scaled,
            states=states,
        )
        return step, SampleColumns.greedy(extent.samples)
