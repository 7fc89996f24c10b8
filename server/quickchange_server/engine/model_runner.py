"""Runs scheduled steps on the model: flattened rows in, sampled tokens and new drafts out.

A step is launched, which gives all its work to the device, and its results are read later: what the
next step needs of them, the sampled tokens, stays on the device. What a step needs goes up in one
copy, and what it gives comes down in one; only token masks follow the rest, since they are made
while the forward pass runs. Steps of a few fixed shapes run from captured graphs where the device
has them; all others take one common path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quickchange_kernels import dispatch
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.sampling.sample_contract import Edits
from quickchange_kernels.sampling.token_mask import mask_words
from quickchange_server.adapters.manager import AdapterTiers
from quickchange_server.engine.inputs.sample_tables import BatchTables, RowTables, SampleColumns
from quickchange_server.engine.inputs.step_shapes import (
    Extent,
    PlanShape,
    StepBuckets,
    exact_extent,
)
from quickchange_server.engine.inputs.virtual_inputs import virtual_inputs
from quickchange_server.engine.model_inputs import StepInputs, step_inputs
from quickchange_server.engine.parallel.followers import Followers
from quickchange_server.engine.prompt_outputs import ReadInputs, ReadRows, read, read_inputs
from quickchange_server.engine.sampler import Sampler
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import isolated
from quickchange_server.engine.step_graphs import StepGraphs, StepOutput, StepTree
from quickchange_server.engine.step_results import Flight, Landing
from quickchange_server.engine.token_masks import NO_MASKS, TokenMasks
from quickchange_server.engine.warm_up import BlankHeads, StepLimits, largest_steps, steps
from quickchange_server.model.graphs.recorded_steps import NativeCapture, capture_for
from quickchange_server.model.input_buffers import Download, upload
from quickchange_server.model.loading.model_loader import LoadedModel, Output, forward
from quickchange_server.spec_decode.cost_model import stopwatch
from quickchange_server.spec_decode.draft_head_plan import DraftPlan, Round
from quickchange_server.spec_decode.draft_heads import DraftItem, Guide, HeadDrafter
from quickchange_server.spec_decode.speculator import NoSpeculation
from quickchange_server.spec_decode.verifier import Fed, fed, judge

MasksFor = Callable[[Sequence[Scheduled]], TokenMasks]

_PRICED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PRICING_ROUNDS = 3


class HeadPlan(Protocol):
    """The part of speculation that decides what the heads draft after a step."""

    def depths(self, plan: Sequence[Scheduled]) -> Mapping[str, int]:
        """Draft depth of the heads by request id; requests without drafts are left out."""
        ...

    def guide(self, items: Sequence[Scheduled]) -> Guide | None:
        """The guide that may revise the drafts of these items; None: they stay."""
        ...


class Runner:
    """Runs steps on one model; owns its caches, sampler and head drafter."""

    def __init__(
        self,
        model: LoadedModel,
        adapters: AdapterTiers,
        masks: MasksFor,
        *,
        num_blocks: int,
        block_size: int,
        most_graph_rows: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        state_rows: int = 0,
        max_sequences: int | None = None,
        max_batch_tokens: int = 0,
        followers: Followers | None = None,
    ) -> None:
        """masks: makes the token masks of sampling items. most_graph_rows: rows of the largest
        decode step from a captured graph, if there are graphs. state_rows: room for the states of
        recurrent layers. max_sequences: of a step; None: as many as `most_graph_rows`.
        max_batch_tokens: of a step, for the graphs of mixed ones; 0: there are none. followers: run
        every pass with their parts of the model; None: it is whole."""
        self._model = model
        self._followers = followers
        self._adapters = adapters
        self._masks = masks
        self._block_size = block_size
        self._device = device
        self._dtype = dtype
        # Told of the hidden states [R, H] of each step's sampled and scored rows, which hold until
        # the next step is launched.
        self.watch: Callable[[Tensor], None] | None = None
        self._sampler = Sampler(model.vocabulary, device)
        self._drafter = HeadDrafter(model, device)
        self._states_on = device if model.recurrent else None
        self._tokens = torch.zeros(most_graph_rows, dtype=torch.int64, device=device)
        sequences = max_sequences or most_graph_rows
        blocks = -(-max_model_len // block_size)
        capture = capture_for(device)
        recorded = isinstance(capture, NativeCapture)
        mixed = 0 if model.recurrent or recorded else max_batch_tokens
        if followers is not None:
            capture = None if recorded else capture and followers.capture(capture)
            followers.install_caches(
                num_blocks=num_blocks, block_size=block_size, state_rows=state_rows, dtype=dtype
            )
        every = capture is not None or dispatch.triton_compiles(device)
        self._rows = BatchTables(model.vocabulary, every=every)
        self._graphs_of = partial(
            StepGraphs,
            StepBuckets(most_graph_rows, blocks, sequences, mixed, exact=recorded),
            self._compute_all,
            device=device,
            block_size=block_size,
            sequences=sequences,
            blocks=blocks,
            recurrent=bool(model.recurrent),
            scaled=model.scaling is not None,
            tokens=self._tokens,
            at_need=recorded,
        )
        self._graphs = capture and self._graphs_of(capture=capture)
        self._recorded = recorded and self._graphs is not None
        model.install_caches(
            num_blocks=num_blocks,
            block_size=block_size,
            state_rows=state_rows,
            dtype=dtype,
            device=device,
        )

    @property
    def captures(self) -> int:
        """Number of graphs captured so far."""
        return 0 if self._graphs is None else self._graphs.captures

    def warm_up(self) -> None:
        """Capture every graph now, so that no request waits for one."""
        if self._graphs is None:
            return
        self._graphs.warm_up(None)
        if self._adapters.served:
            self._graphs.warm_up(self._adapters.tables)

    def rehearse(self, limits: StepLimits) -> None:
        """Run the largest steps there are, for the memory that they take. The caches need hold no
        more than a block and a state."""
        self._run_all(largest_steps(limits))

    def launch_all(self, limits: StepLimits) -> None:
        """Launch every kernel that a request may need; see warm_up.py. Raises RuntimeError if a
        step can't be made."""
        self._run_all(steps(limits))
        vocabulary = self._model.vocabulary
        logits = torch.zeros(1, vocabulary, dtype=self._dtype, device=self._device)
        bits = torch.zeros(1, mask_words(vocabulary), dtype=torch.int32)
        TokenMasks(torch.zeros(1, dtype=torch.int64), bits, {}, None).apply_(logits)
        if limits.adapters and limits.drafts:
            hidden = torch.zeros(1, self._model.hidden, dtype=self._dtype, device=self._device)
            token = torch.zeros(1, dtype=torch.int64, device=self._device)
            blank = BlankHeads(self._adapters, vocabulary)
            for slot, turbo in enumerate(blank.slots):
                item = DraftItem(0, slot, turbo.depth, ())
                self._drafter.draft(hidden, token, [item], blank)

    def _run_all(self, plans: Iterable[Sequence[Scheduled]]) -> None:
        for plan in plans:
            if faults := self.launch(plan, NoSpeculation()).ran().faults:
                raise RuntimeError(f"the warm-up can't be computed: {'; '.join(faults.values())}")

    def price_rows(self, most: int) -> list[tuple[int, float]]:
        """(rows, seconds) of decode steps of up to `most` rows, without adapters, as they run: from
        graphs where there are any for so many rows."""
        # The largest first: the graphs' outputs, which all share, need not grow and be left behind.
        sizes = [rows for rows in reversed(_PRICED_ROWS) if rows <= most]
        rounds = [[self._priced(rows) for rows in sizes] for _ in range(_PRICING_ROUNDS)]
        if self._recorded:  # most of the plans will not be asked for, and would keep their memory
            self._graphs = self._graphs_of(capture=NativeCapture())
        priced = [(rows, min(times)) for rows, *times in zip(sizes, *rounds, strict=True)]
        return priced[::-1]

    def launch(self, plan: Sequence[Scheduled], heads: HeadPlan) -> Flight:
        """Give the device all the work of `plan` and of the drafts that `heads` asks for.

        Pending tokens are those of the step that was launched last. Raises what goes wrong in work
        that the items share.
        """
        faults: dict[str, str] = {}
        if not plan:
            return Flight(plan, faults)
        depths = heads.depths(plan)
        watch = stopwatch(self._device)
        watch.mark()
        sound, inputs = isolated(plan, self._inputs, faults)
        if inputs is None:
            return Flight(plan, faults)
        sampling = [item for item in sound if item.samples]
        drafting = self._drafting(sampling, depths, heads, faults)
        output, parts = self._forward(sound, inputs, drafting)
        if self.watch is not None:
            self.watch(output.hidden)
        rows = None
        if parts.read is not None:
            output, rows = _read(output, parts.read, inputs.shape.samples)
        if not sampling:
            landing = None if rows is None else Download(Landing(read=rows), self._device)
            return Flight(plan, faults, sound, landing)
        masks = self._masks_of(sampling, faults)  # on the host, while a GPU runs the forward pass
        own = (parts.columns, parts.edits, parts.asking)
        draw = self._sampler.draw(output.logits, inputs.tables, masks, own, output.picked)
        verdict = judge(draw.tokens, parts.fed)
        if parts.fed is not None or draw.picks.table is not output.picked:
            self._tokens[: len(sampling)].copy_(verdict.token)  # else the graph has done so
        for row, item in enumerate(sampling):
            item.sequence.token_row = row
        watch.mark()
        drafts = None
        if drafting is not None:
            drafts = self._drafter.run(
                drafting.plan,
                parts.rounds,
                verdict.at_last_rows(output.hidden),
                verdict.token,
                self._adapters,
                accepted=verdict.accepted,
                guide=drafting.guide,
            )
        watch.mark()
        landing = Download(Landing(draw.picks, verdict.accepted, drafts, rows), self._device)
        items = () if drafting is None else drafting.plan.items
        return Flight(plan, faults, sound, landing, draw, items, watch, masks.seconds)

    def _inputs(self, plan: Sequence[Scheduled]) -> _Inputs:
        """All that the plan's items need on the device, but for masks and drafts, on the host."""
        shape = PlanShape.of(plan)
        sampling = [item for item in plan if item.samples]
        tables = self._rows.of(sampling)
        read = read_inputs(plan) if shape.reads else None
        slots = {slot for components in shape.components for slot, _ in components}
        adapters = self._adapters.tables_of(slots) if slots else None
        virtual = virtual_inputs(plan, self._block_size)
        usual = virtual is None and (not slots or adapters is self._adapters.tables)
        extent = None
        if self._graphs is not None and usual:
            extent = self._graphs.fit(plan, shape)
        step = None
        if self._graphs is not None and extent is not None:
            self._graphs.write(plan, shape, extent, tables.columns)
        else:
            exact = exact_extent(plan, shape, self._device)
            scaled = self._model.scaling is not None
            step = step_inputs(
                plan,
                shape,
                exact,
                self._block_size,
                self._states_on,
                scaled=scaled,
                virtual=virtual,
            )
        return _Inputs(shape, tables, adapters, fed(sampling), read, extent, step)

    def _forward(
        self, plan: Sequence[Scheduled], inputs: _Inputs, drafting: _Drafting | None
    ) -> tuple[StepOutput, _Parts]:
        """Output of the sampled rows, then of those that are read, and the rest on the device."""
        tables = inputs.adapters
        rounds = () if drafting is None else drafting.plan.rounds
        own = inputs.tables
        others = (own.edits, own.asking, inputs.fed, rounds, inputs.read)
        if self._graphs is not None and inputs.extent is not None:
            whole, columns, arrived = self._graphs.run(
                inputs.extent, plan, tables, None if others == _NOTHING else others
            )
            rows = inputs.shape.samples
            picked = None if whole.picked is None else whole.picked[:, :rows]
            output = StepOutput(whole.logits[:rows], whole.hidden[:rows], picked)
            columns = SampleColumns(columns.table[:, :rows], columns.names)
            return output, _Parts(columns, *(arrived or _NOTHING))
        step = inputs.step
        if step is None:
            raise ValueError("inputs for a graph that is not there")
        step, columns, arrived = upload((step, own.columns, others), self._device)
        return StepOutput(*self._compute(step, tables)), _Parts(columns, *arrived)

    def _compute_all(
        self, inputs: StepTree, tables: LowRankTables | None, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output of a graph's rows and their tokens, which are left for the next step too."""
        step, columns = inputs
        logits, hidden = self._compute(step, tables, kept)
        picked = self._sampler.pick(logits, columns)
        self._tokens[: picked.shape[1]].copy_(picked[0])
        return logits, hidden, picked

    def _compute(
        self, inputs: StepInputs, tables: LowRankTables | None, kept: Tensor | None = None
    ) -> Output:
        """Logits [R, V] and hidden states [R, H] of inputs on the device. kept: block tables that
        stay there."""
        holder = self._model.holder
        holder.step = inputs.step(tables, kept)
        try:
            ids, rows = inputs.ids, inputs.sample_rows
            if inputs.feed is not None:
                pending = self._tokens.index_select(0, inputs.feed.clamp(min=0))
                ids = torch.where(inputs.feed < 0, ids, pending)
            given = ids, inputs.positions, rows, inputs.head_rows
            if self._followers is not None:
                self._followers.forward(holder.step, given)
            return forward(self._model, *given)
        finally:
            holder.step = None

    def _masks_of(self, sampling: Sequence[Scheduled], faults: dict[str, str]) -> TokenMasks:
        """Masks of the items' rows, without those of items for which none can be made."""
        maskable, masks = isolated(sampling, self._masks, faults)
        if masks is None:
            return NO_MASKS
        if len(maskable) < len(sampling):
            kept = {item.sequence.request_id for item in maskable}
            masks = masks.moved(
                [
                    item.sequence.request_id in kept
                    for item in sampling
                    for _ in range(item.sampled_rows)
                ]
            )
        return masks

    def _drafting(
        self,
        sampling: Sequence[Scheduled],
        depths: Mapping[str, int],
        heads: HeadPlan,
        faults: dict[str, str],
    ) -> _Drafting | None:
        """The plan of the heads' drafts after each item's last token; None: they draft nothing."""
        if not depths:
            return None
        items = [
            DraftItem(row, item.heads, depth, item.components)
            for row, item in enumerate(sampling)
            if (depth := depths.get(item.sequence.request_id, 0)) and item.heads is not None
        ]
        drafting, guide = isolated([sampling[item.row] for item in items], heads.guide, faults)
        if not drafting:
            return None
        items = [item for item in items if sampling[item.row].sequence.request_id not in faults]
        plan = self._drafter.plan(items, self._adapters, len(sampling))
        return _Drafting(plan, guide)

    def _priced(self, rows: int) -> float:
        watch = stopwatch(self._device)
        extent = None if self._graphs is None else self._graphs.holding(rows)
        if self._graphs is not None and extent is not None:
            self._graphs.write_nothing(extent)
            watch.mark()
            output, _, _ = self._graphs.run(extent, (), None, None)
        else:
            exact = Extent(rows, rows, rows, 1, None, None, None)
            step = step_inputs((), PlanShape.of(()), exact, self._block_size, self._states_on)
            step = upload(step, self._device)
            watch.mark()
            output = StepOutput(*self._compute(step, None))
        watch.mark()
        Download(output.logits[-1:, -1:], self._device).tree()  # waits for the device
        return watch.seconds()[0]


class _Inputs(NamedTuple):
    """A step's inputs on the host: written for a graph, or in tensors of their own."""

    shape: PlanShape
    tables: RowTables
    adapters: LowRankTables | None  # None: no row has one
    fed: Fed | None
    read: ReadInputs | None
    extent: Extent | None  # of the captured graph that the step runs from; None: none
    step: StepInputs | None  # None: it runs from a graph


class _Parts(NamedTuple):
    """What a step needs on the device behind its forward pass."""

    columns: SampleColumns
    edits: Edits | None
    asking: Tensor | None
    fed: Fed | None
    rounds: tuple[Round, ...]
    read: ReadInputs | None


class _Drafting(NamedTuple):
    plan: DraftPlan
    guide: Guide | None


_NOTHING = (None, None, None, (), None)


def _read(output: StepOutput, inputs: ReadInputs, sampled: int) -> tuple[StepOutput, ReadRows]:
    """Output of the sampled rows, and what is read of those behind them."""
    scored = sampled + len(inputs.targets)
    rows = read(output.logits[sampled:scored], output.hidden[scored:], inputs)
    return StepOutput(output.logits[:sampled], output.hidden[:sampled]), rows
