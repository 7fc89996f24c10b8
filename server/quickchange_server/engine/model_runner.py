"""Runs scheduled steps on the model: flattened rows in, sampled tokens and new drafts out.

A step is launched, which gives all its work to the device, and its results are read later: what the
next step needs of them, the sampled tokens, stays on the device. Decode steps run from captured
graphs where the device has them; all others take one common path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.sampling.token_mask import mask_words
from quickchange_server.adapters.batch_segments import full_room
from quickchange_server.adapters.manager import AdapterTiers
from quickchange_server.engine.model_inputs import (
    DecodeBuckets,
    Extent,
    StepInputs,
    exact_extent,
    one_row_each,
    reads,
    row_feed,
    row_reach,
    step_inputs,
)
from quickchange_server.engine.prompt_outputs import SCORED_AT_ONCE, read, score_columns
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
from quickchange_server.engine.warm_up import BlankHeads, StepLimits, steps
from quickchange_server.model.cuda_graphs import Graphs, capture_for
from quickchange_server.model.input_buffers import upload
from quickchange_server.model.loading.model_loader import LoadedModel, Output, forward
from quickchange_server.protocol import SamplingParams
from quickchange_server.spec_decode.cost_model import Stopwatch, stopwatch
from quickchange_server.spec_decode.draft_heads import DraftItem, Guide, HeadDrafter
from quickchange_server.spec_decode.speculator import NoSpeculation
from quickchange_server.spec_decode.verifier import Verdict, judge

MasksFor = Callable[[Sequence[Scheduled]], TokenMasks]

_PRICED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PRICING_ROUNDS = 3
_MOST_SCORES = 20
_WIDEST = SampleRow(  # of all that rows may ask of the sampler
    SamplingParams(
        max_tokens=1, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, logprobs=_MOST_SCORES
    ),
    seed=0,
    position=0,
    prompt=(),
    output=(),
)


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
        self._dtype = dtype
        self._sampler = Sampler(model.vocabulary, device)
        self._drafter = HeadDrafter(model, device)
        capture = capture_for(device)
        self._graphs = None if capture is None else Graphs(self._compute, capture, device)
        self._buckets = DecodeBuckets(most_graph_rows, -(-max_model_len // block_size))
        self._states_on = device if model.recurrent else None
        self._tokens = torch.zeros(most_graph_rows, dtype=torch.int64, device=device)
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
        for adapters in (False, True) if self._adapters.served else (False,):
            for extent in self._buckets.extents(adapters=adapters):
                nothing = self._padded_inputs((), extent)
                self._graphs.run(extent, nothing, self._adapters.tables if adapters else None)

    def rehearse(self, rows: int, sequences: int) -> None:
        """Run the largest step there is, on no content, for the memory that it takes.

        It is a prefill whose rows are all scored, under adapters, with the sampler behind as many
        rows as are ever drawn, by all of its parameters.
        """
        room = full_room(rows, sequences, self._device) if self._adapters.served else None
        extent = Extent(rows, sequences, rows, self._buckets.blocks, room, room, room)
        inputs = upload(self._padded_inputs((), extent), self._device)
        logits = self._compute(inputs, self._adapters.tables if room is not None else None).logits
        scored = logits[:SCORED_AT_ONCE]
        score_columns(scored, scored.new_zeros(len(scored), dtype=torch.int64), _MOST_SCORES)
        drawn = min(rows, len(self._tokens))
        self._sampler.draw(logits[:drawn], [_WIDEST] * drawn)

    def launch_all(self, limits: StepLimits) -> None:
        """Launch every kernel that a request may need; see warm_up.py. Raises RuntimeError if a
        step can't be made."""
        for plan in steps(limits):
            if faults := self.launch(plan, NoSpeculation()).ran().faults:
                raise RuntimeError(f"the warm-up can't be computed: {'; '.join(faults.values())}")
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

    def price_rows(self, most: int) -> list[tuple[int, float]]:
        """(rows, seconds) of decode steps of up to `most` rows, without adapters."""
        sizes = [rows for rows in _PRICED_ROWS if rows <= most]
        rounds = [[self._priced(rows) for rows in sizes] for _ in range(_PRICING_ROUNDS)]
        return [(rows, min(times)) for rows, *times in zip(sizes, *rounds, strict=True)]

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
        output, prompts = self._forward(inputs), None
        if reads(sound):
            output, prompts = _apart(sound, output)
        # On the host, while a GPU runs the forward pass.
        sampling = [item for item in sound if item.samples]
        drawable, made = isolated(sampling, self._row_tables, faults) if sampling else ([], None)
        if made is None:
            return Flight(plan, faults, prompts)
        output = _rows_of(drawable, sampling, output)
        masks, tables = made
        draw = self._sampler.draw(output.logits, tables, masks)
        verdict = judge(drawable, draw.tokens)
        self._keep_tokens(drawable, verdict.token)
        watch.mark()
        drafted = self._draft(drawable, depths, verdict, output.hidden, heads, faults)
        watch.mark()
        on_device = (draw.table, verdict.accepted, drafted.tokens, drafted.chances)
        drawn = _Drawn(drawable, draw, verdict, drafted.items, Download(on_device, self._device))
        return Flight(plan, faults, prompts, drawn, watch, masks.seconds)

    def _keep_tokens(self, sampling: Sequence[Scheduled], tokens: Tensor) -> None:
        """Leave the items' last tokens [S] where the next step finds them."""
        self._tokens[: len(sampling)] = tokens
        for row, item in enumerate(sampling):
            item.sequence.token_row = row

    def _row_tables(self, sampling: Sequence[Scheduled]) -> tuple[TokenMasks, RowTables]:
        rows = [row for item in sampling for row in _sample_rows(item)]
        return self._masks(sampling), self._sampler.tables(rows)

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
        if self._graphs is not None or any(item.sequence.pending for item in plan):
            inputs = replace(inputs, feed=row_feed(plan, extent.rows))
        if self._model.scaling is not None:
            inputs = replace(inputs, reach=row_reach(plan, extent.rows))
        return inputs

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
            ids, rows = inputs.ids, inputs.sample_rows
            if inputs.feed is not None:
                fed = self._tokens[inputs.feed.clamp(min=0)]
                ids = torch.where(inputs.feed < 0, ids, fed)
            return forward(self._model, ids, inputs.positions, rows, inputs.head_rows)
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


class Download:
    """Tensors on their way to the host, behind all that the device was given before.

    On a CPU they are there. Elsewhere they are copied to pinned memory, and `wait` waits for these
    copies alone.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], device: torch.device) -> None:
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._tensors = tuple(t if t is None else _to_pinned(t) for t in tensors)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> tuple[Tensor | None, ...]:
        """The tensors on the host, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _PromptRows(NamedTuple):
    """Rows that sequences read of their prompts."""

    items: Sequence[Scheduled]
    logits: Tensor  # [C, V] of the scored rows
    hidden: Tensor  # [P, H] of the pooled rows


class _Drawn(NamedTuple):
    """What a step sampled, for the items that could be."""

    items: Sequence[Scheduled]
    draw: Draw
    verdict: Verdict
    drafting: Sequence[DraftItem]
    download: Download


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step.

    `faults`: by request id, errors of single items that the launch has met; the items may not have
    been computed.
    """

    plan: Sequence[Scheduled]
    faults: dict[str, str]
    _prompts: _PromptRows | None = None
    _drawn: _Drawn | None = None
    _watch: Stopwatch | None = None
    _mask_seconds: float | None = None

    def ran(self) -> Ran:
        """The results, once the device has got so far. To be called once."""
        if self._prompts is not None:
            read(*self._prompts, self.faults)
        if self._drawn is None or self._watch is None:
            return Ran(_results(self.plan, {}, self.faults), faults=self.faults)
        results = _results(self.plan, _item_results(self._drawn), self.faults)
        seconds, draft_seconds = self._watch.seconds()
        drafts_took = draft_seconds if self._drawn.drafting else None
        return Ran(results, seconds, drafts_took, self._mask_seconds, self.faults)


class _Inputs(NamedTuple):
    """Host tensors of a step."""

    step: StepInputs
    tables: LowRankTables | None  # None: no row has an adapter
    rows: int
    bucket: Extent | None = None  # of the captured graph that the step runs from; None: none


class _Drafted(NamedTuple):
    items: list[DraftItem]
    tokens: Tensor | None  # int64 [items, depth]
    chances: Tensor | None  # float32 [items, depth]


_NOTHING = _Drafted([], None, None)


def _apart(plan: Sequence[Scheduled], output: Output) -> tuple[Output, _PromptRows]:
    """Output of the sampled rows, and those that sequences read of their prompts."""
    sampled = sum([item.sampled_rows for item in plan])
    scored = sampled + sum([len(item.scored) for item in plan])
    prompts = _PromptRows(plan, output.logits[sampled:scored], output.hidden[scored:])
    return Output(output.logits[:sampled], output.hidden[:sampled]), prompts


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
    if not faults:
        return [drawn[i] for i in ids]
    errors = {i: Result((RowError(0, fault, "request"),), ()) for i, fault in faults.items()}
    return [errors.get(i) or drawn[i] for i in ids]


def _item_results(drawn: _Drawn) -> dict[str, Result]:
    """Results of the drawn items by request id, on the host."""
    table, accepted, tokens, chances = drawn.download.wait()
    counts = drawn.verdict._replace(accepted=accepted).counts(len(drawn.items))
    rows = iter(drawn.draw.results(table))
    ahead = _ahead(drawn.drafting, tokens, chances)
    results = {}
    for row, (item, held) in enumerate(zip(drawn.items, counts, strict=True)):
        sampled = tuple([next(rows) for _ in range(item.sampled_rows)])
        results[item.sequence.request_id] = Result(sampled[: held + 1], ahead.get(row, ()))
    return results


def _ahead(
    items: Sequence[DraftItem], tokens: Tensor | None, chances: Tensor | None
) -> dict[int, tuple[tuple[int, float], ...]]:
    """(token, probability) by depth, keyed by the index among the sampling items."""
    if tokens is None or chances is None:
        return {}
    return {
        item.row: tuple(zip(own_tokens, own_chances, strict=True))[: item.depth]
        for item, own_tokens, own_chances in zip(
            items, tokens.tolist(), chances.tolist(), strict=True
        )
    }


def _sample_rows(item: Scheduled) -> list[SampleRow]:
    """Rows of the last token and of each draft, as if all drafts before it were accepted."""
    sequence = item.sequence
    known, prompt = item.first + item.count, len(sequence.request.prompt)
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
