"""Runs one scheduled step on the model: flattened rows in, sampled tokens and new drafts out.

Decode steps run from captured graphs where the device has them; all others take one common path.
Nothing waits for the device between the forward pass and the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.manager import AdapterTiers
from quickchange_server.engine.model_inputs import (
    DecodeBuckets,
    Extent,
    StepInputs,
    exact_extent,
    one_row_each,
    reads,
    row_reach,
    step_inputs,
)
from quickchange_server.engine.prompt_outputs import read
from quickchange_server.engine.sampler import (
    Draw,
    RowError,
    RowTables,
    SampledToken,
    Sampler,
    SampleRow,
)
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import isolated
from quickchange_server.engine.token_masks import TokenMasks
from quickchange_server.model.cuda_graphs import Graphs, capture_for
from quickchange_server.model.input_buffers import upload
from quickchange_server.model.loading.model_loader import LoadedModel, Output, forward
from quickchange_server.spec_decode.cost_model import stopwatch
from quickchange_server.spec_decode.draft_heads import DraftItem, Guide, HeadDrafter
from quickchange_server.spec_decode.verifier import Verdict, judge

MasksFor = Callable[[Sequence[Scheduled]], TokenMasks]

_PRICED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PRICING_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens and new drafts of one sampling item."""

    # By row, down to the first rejected draft's.
    sampled: tuple[SampledToken | RowError, ...]
    drafts: tuple[tuple[int, float], ...]  # (token, probability) from the heads, for after these


@dataclass(frozen=True, slots=True)
class Ran:
    """A step's results, one for each sampling item in the plan's order, and its durations.

    `faults`: by request id, errors that belong to one item, which was left out; its result, if it
    samples, is an error too.
    """

    results: list[Result]
    seconds: float | None = None  # forward pass and sampling; None if nobody waits for their end
    draft_seconds: float | None = None  # heads; None if none ran
    mask_seconds: float | None = None  # token masks, on the host; None if there were none
    faults: Mapping[str, str] = field(default_factory=dict)


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
    ) -> None:
        """masks: makes the token masks of sampling items. most_graph_rows: rows of the largest
        captured graph, if there are graphs. state_rows: room for the states of recurrent layers."""
        self._model = model
        self._adapters = adapters
        self._masks = masks
        self._block_size = block_size
        self._device = device
        self._sampler = Sampler(model.vocabulary, device)
        self._drafter = HeadDrafter(model, device)
        capture = capture_for(device)
        self._graphs = None if capture is None else Graphs(self._compute, capture, device)
        self._buckets = DecodeBuckets(most_graph_rows, -(-max_model_len // block_size))
        self._states_on = device if model.recurrent else None
        model.install_caches(
            num_blocks=num_blocks,
            block_size=block_size,
            state_rows=state_rows,
            dtype=dtype,
            device=device,
        )

    def warm_up(self) -> None:
        """Capture every graph now, so that no request waits for one."""
        if self._graphs is None:
            return
        for adapters in (False, True) if self._adapters.served else (False,):
            for extent in self._buckets.extents(adapters=adapters):
                nothing = self._padded_inputs((), extent)
                self._graphs.run(extent, nothing, self._adapters.tables if adapters else None)

    def price_rows(self, most: int) -> list[tuple[int, float]]:
        """(rows, seconds) of decode steps of up to `most` rows, without adapters."""
        sizes = [rows for rows in _PRICED_ROWS if rows <= most]
        rounds = [[self._priced(rows) for rows in sizes] for _ in range(_PRICING_ROUNDS)]
        return [(rows, min(times)) for rows, *times in zip(sizes, *rounds, strict=True)]

    def run(self, plan: Sequence[Scheduled], heads: HeadPlan) -> Ran:
        """Compute `plan`, then the drafts that `heads` asks for.

        Raises what goes wrong in work that the items share.
        """
        if not plan:
            return Ran([])
        depths = heads.depths(plan)
        watch = stopwatch(self._device)
        watch.mark()
        faults: dict[str, str] = {}
        sound, inputs = isolated(plan, self._inputs, faults)
        if inputs is None:
            return Ran(_results(plan, {}, faults), faults=faults)
        output = self._forward(inputs)
        if reads(sound):
            output = self._read(sound, output, faults)
        sampling = [item for item in sound if item.samples]
        # On the host, while a GPU runs the forward pass.
        readable = [item for item in sampling if item.sequence.request_id not in faults]
        drawable, made = isolated(readable, self._row_tables, faults) if readable else ([], None)
        if made is None:
            return Ran(_results(plan, {}, faults), faults=faults)
        output = _rows_of(drawable, sampling, output)
        masks, tables = made
        draw = self._sampler.draw(output.logits, tables, masks)
        verdict = judge(drawable, draw.tokens)
        watch.mark()
        drafted = self._draft(drawable, depths, verdict, output.hidden, heads, faults)
        watch.mark()
        results = _results(plan, _item_results(drawable, verdict, draw, drafted), faults)
        seconds, draft_seconds = watch.seconds()
        drafts_took = draft_seconds if drafted.items else None
        return Ran(results, seconds, drafts_took, masks.seconds, faults)

    def _row_tables(self, sampling: Sequence[Scheduled]) -> tuple[TokenMasks, RowTables]:
        rows = [row for item in sampling for row in _sample_rows(item)]
        return self._masks(sampling), self._sampler.tables(rows)

    def _read(self, plan: Sequence[Scheduled], output: Output, faults: dict[str, str]) -> Output:
        """Let sequences read their prompts' rows; returns the output of the sampled rows."""
        sampled = sum([item.sampled_rows for item in plan])
        scored = sampled + sum([len(item.scored) for item in plan])
        read(plan, output.logits[sampled:scored], output.hidden[scored:], faults)
        return Output(output.logits[:sampled], output.hidden[:sampled])

    def _draft(
        self,
        sampling: Sequence[Scheduled],
        depths: Mapping[str, int],
        verdict: Verdict,
        hidden: Tensor,
        heads: HeadPlan,
        faults: dict[str, str],
    ) -> _Drafted:
        """The heads' drafts after each item's last token. hidden [R, H]."""
        if not depths:
            return _NOTHING
        items = [
            DraftItem(row, item.heads, depth, item.components)
            for row, item in enumerate(sampling)
            if (depth := depths.get(item.sequence.request_id, 0)) and item.heads is not None
        ]
        drafting, guide = isolated([sampling[item.row] for item in items], heads.guide, faults)
        if not drafting:
            return _NOTHING
        items = [item for item in items if sampling[item.row].sequence.request_id not in faults]
        drafts = self._drafter.draft(
            verdict.at_last_rows(hidden),
            verdict.token,
            items,
            self._adapters,
            guide=guide,
        )
        return _Drafted(items, *drafts)

    def _inputs(self, plan: Sequence[Scheduled]) -> _Inputs:
        slots = {slot for item in plan for slot, _ in item.components}
        adapters = bool(slots)
        tables = self._adapters.tables_of(slots) if slots else None
        fixed = tables is None or tables is self._adapters.tables
        rows = sum([item.rows for item in plan])
        extent = None
        if self._graphs is not None and fixed and (self._states_on is None or one_row_each(plan)):
            extent = self._buckets.fit(plan, adapters=adapters)
        if extent is not None:
            return _Inputs(self._padded_inputs(plan, extent), tables, rows, extent)
        exact = exact_extent(plan, self._device, adapters=adapters)
        return _Inputs(self._padded_inputs(plan, exact), tables, rows)

    def _padded_inputs(self, plan: Sequence[Scheduled], extent: Extent) -> StepInputs:
        inputs = step_inputs(plan, extent, self._block_size, self._states_on)
        if self._model.scaling is None:
            return inputs
        return replace(inputs, reach=row_reach(plan, extent.rows))

    def _forward(self, inputs: _Inputs) -> Output:
        """Output of the sampled rows, then of those that are read."""
        tables = inputs.tables
        if self._graphs is not None and inputs.bucket is not None:
            logits, hidden = self._graphs.run(inputs.bucket, inputs.step, tables)
            return Output(logits[: inputs.rows], hidden[: inputs.rows])
        return self._compute(upload(inputs.step, self._device), tables)

    def _compute(self, inputs: StepInputs, tables: LowRankTables | None) -> Output:
        """Logits [R, V] and hidden states [R, H] of inputs on the device."""
        holder = self._model.holder
        holder.step = inputs.step(tables)
        try:
            rows = inputs.sample_rows
            return forward(self._model, inputs.ids, inputs.positions, rows, inputs.head_rows)
        finally:
            holder.step = None

    def _priced(self, rows: int) -> float:
        extent = Extent(rows, rows, rows, 1, None, None, None)
        inputs = upload(self._padded_inputs((), extent), self._device)
        watch = stopwatch(self._device)
        watch.mark()
        logits = self._compute(inputs, None).logits
        watch.mark()
        logits[-1, -1].item()  # waits for the device
        return watch.seconds()[0]


class _Inputs(NamedTuple):
    """Host tensors of a step."""

    step: StepInputs
    tables: LowRankTables | None  # None: no row has an adapter
    rows: int
    bucket: Extent | None = None  # of the captured graph that the step runs from; None: none


class _Drafted(NamedTuple):
    items: list[DraftItem]
    tokens: Tensor  # int64 [items, depth]
    chances: Tensor  # float32 [items, depth]


_NOTHING = _Drafted([], torch.empty(0, 0), torch.empty(0, 0))


def _rows_of(kept: Sequence[Scheduled], items: Sequence[Scheduled], output: Output) -> Output:
    """The rows of those items that are kept, from the sampled rows of `items`."""
    if len(kept) == len(items):
        return output
    ids = {item.sequence.request_id for item in kept}
    whose = [item.sequence.request_id in ids for item in items for _ in range(item.sampled_rows)]
    where = torch.tensor(whose, device=output.logits.device)
    return Output(output.logits[where], output.hidden[where])


def _results(
    plan: Sequence[Scheduled], drawn: Mapping[str, Result], faults: Mapping[str, str]
) -> list[Result]:
    """Results of all sampling items: of those drawn, by request id, and the others' errors."""
    ids = [item.sequence.request_id for item in plan if item.samples]
    return [drawn.get(i) or Result((RowError(0, faults[i], "request"),), ()) for i in ids]


def _item_results(
    sampling: Sequence[Scheduled], verdict: Verdict, draw: Draw, drafted: _Drafted
) -> dict[str, Result]:
    """Results of the drawn items by request id, on the host."""
    accepted = verdict.counts(len(sampling))
    rows = iter(draw.results())
    ahead = _ahead(drafted)
    results = {}
    for row, (item, held) in enumerate(zip(sampling, accepted, strict=True)):
        sampled = tuple([next(rows) for _ in range(item.sampled_rows)])
        results[item.sequence.request_id] = Result(sampled[: held + 1], ahead.get(row, ()))
    return results


def _ahead(drafted: _Drafted) -> dict[int, tuple[tuple[int, float], ...]]:
    """(token, probability) by depth, keyed by the index among the sampling items."""
    if not drafted.items:
        return {}
    tokens, chances = drafted.tokens.tolist(), drafted.chances.tolist()
    return {
        item.row: tuple(zip(own_tokens, own_chances, strict=True))[: item.depth]
        for item, own_tokens, own_chances in zip(drafted.items, tokens, chances, strict=True)
    }


def _sample_rows(item: Scheduled) -> list[SampleRow]:
    """Rows of the last token and of each draft, as if all drafts before it were accepted."""
    sequence = item.sequence
    known, prompt = len(sequence.tokens), len(sequence.request.prompt)
    tokens = [*sequence.tokens, *item.drafts] if item.drafts else sequence.tokens
    return [
        SampleRow(
            params=sequence.request.sampling,
            seed=sequence.request.seed,
            position=end,
            prompt=TokenWindow(tokens, 0, prompt),
            output=TokenWindow(tokens, prompt, end),
        )
        for end in range(known, known + item.sampled_rows)
    ]


class TokenWindow(Sequence[int]):
    """values[begin:end] without a copy of a long prompt; `values` may only grow at its end."""

    __slots__ = ("_begin", "_end", "_values")

    def __init__(self, values: list[int], begin: int, end: int) -> None:
        self._values, self._begin, self._end = values, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._values[self._begin : self._end][index]

    def __iter__(self) -> Iterator[int]:
        return islice(self._values, self._begin, self._end)
