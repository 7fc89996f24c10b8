"""Runs one scheduled step on the model: flattened rows in, sampled tokens and new drafts out.

Steps whose rows all sample run from captured graphs where the device has them; all else is one
path. Between the forward pass and the results nothing waits for the device.

A part of a list, read in place: a long prompt is not copied for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, overload

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.manager import Residency
from quickchange_server.engine.model_inputs import (
    DecodeBuckets,
    Extent,
    StepInputs,
    exact_extent,
    reads,
    step_inputs,
)
from quickchange_server.engine.prompt_outputs import read
from quickchange_server.engine.sampler import RowError, Sampled, Sampler, SampleRow
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.engine.token_masks import TokenMasks
from quickchange_server.model import paged_attention
from quickchange_server.model.cuda_graphs import Graphs, capture_for
from quickchange_server.model.input_buffers import upload
from quickchange_server.model.model_loader import LoadedModel, Output, forward
from quickchange_server.model.paged_attention import PagedAttention
from quickchange_server.spec_decode.cost_model import stopwatch
from quickchange_server.spec_decode.draft_heads import Drafter, DraftItem, Drafts, Guide
from quickchange_server.spec_decode.verifier import Verdict, judge


class Window(Sequence[int]):
    """values[begin:end] as it was when it was made, as long as `values` only grows at its end."""

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


GuideFor = Callable[[Sequence[Scheduled]], Guide | None]
MasksFor = Callable[[Sequence[Scheduled]], TokenMasks | None]

_PRICED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PRICING_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """What an item that samples gave."""

    sampled: tuple[Sampled | RowError, ...]  # row after row, down to the first draft not to hold
    drafts: tuple[tuple[int, float], ...]  # (token, chance) of what the heads expect after these


@dataclass(frozen=True, slots=True)
class Ran:
    """A step's results, one for each item that samples, in the plan's order; and what it took."""

    results: list[Result]
    seconds: float | None  # forward pass and sampling; None where nobody waits for the end
    draft_seconds: float | None  # of the heads; None where none ran
    mask_seconds: float | None = None  # of token masks, on the host; None where none were made


class Runner:
    """Owner of the model, the KV pages, the sampler and the drafter."""

    def __init__(
        self,
        model: LoadedModel,
        residency: Residency | None,
        *,
        num_blocks: int,
        block_size: int,
        most_graph_rows: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        masks: MasksFor | None = None,
    ) -> None:
        """most_graph_rows: of a step that runs from a captured graph, where there are any. masks:
        makes those of the items that sample; None: no text is ever constrained."""
        self._masks = masks
        self._model = model
        self._residency = residency  # None: the server has no adapters
        self._block_size = block_size
        self._device = device
        self._sampler = Sampler(model.vocabulary, device)
        self._drafter = Drafter(model, device)
        capture = capture_for(device)
        self._graphs = None if capture is None else Graphs(self._compute, capture, device)
        self._buckets = DecodeBuckets(most_graph_rows, -(-max_model_len // block_size))
        paged_attention.install(
            model.module,
            PagedAttention(model.layers, num_blocks, block_size, dtype, device, model.holder),
        )

    def warm_up(self) -> None:
        """Capture every graph, so that no request has to wait for one."""
        if self._graphs is None:
            return
        tables = self._tables
        for adapters in (False, True) if tables is not None else (False,):
            for extent in self._buckets.extents(adapters=adapters):
                nothing = step_inputs((), extent, self._block_size)
                self._graphs.run(extent, nothing, tables if adapters else None)

    def price_rows(self, most: int) -> list[tuple[int, float]]:
        """(rows, seconds) of steps of up to `most` rows that all sample, without adapters."""
        sizes = [rows for rows in _PRICED_ROWS if rows <= most]
        rounds = [[self._priced(rows) for rows in sizes] for _ in range(_PRICING_ROUNDS)]
        return [(rows, min(times)) for rows, *times in zip(sizes, *rounds, strict=True)]

    def run(
        self, plan: Sequence[Scheduled], depths: Mapping[str, int], guide: GuideFor | None = None
    ) -> Ran:
        """Compute `plan`, then drafts of so many tokens for the requests in `depths`.

        guide: makes what may revise the drafts of the items that have any.
        """
        watch = stopwatch(self._device)
        watch.mark()
        adapters = any(item.components for item in plan)
        output = self._forward(plan, self._tables if adapters else None)
        sampling = [item for item in plan if item.samples]
        if reads(plan):
            output = self._read(plan, output)
        if not sampling:
            return Ran([], None, None)
        masks = None if self._masks is None else self._masks(sampling)  # beside a GPU's forward
        rows_to_draw = [row for item in sampling for row in _sample_rows(item)]
        draw = self._sampler.draw(output.logits, rows_to_draw, masks)
        verdict = judge(sampling, draw.tokens)
        watch.mark()
        drafts = self._draft(sampling, depths, verdict, output.hidden, guide)
        watch.mark()
        accepted = verdict.counts(len(sampling))
        rows = iter(draw.results())
        drafted = _on_host(drafts, len(sampling))
        results = []
        for item, held, ahead in zip(sampling, accepted, drafted, strict=True):
            sampled = tuple(next(rows) for _ in range(item.sampled_rows))
            results.append(Result(sampled[: held + 1], ahead))
        seconds, draft_seconds = watch.seconds()
        return Ran(
            results,
            seconds,
            None if drafts is None else draft_seconds,
            None if masks is None else masks.seconds,
        )

    def _read(self, plan: Sequence[Scheduled], output: Output) -> Output:
        """Let sequences read their prompts' rows; what is left is of the rows that sample."""
        sampled = sum([item.sampled_rows for item in plan])
        scored = sampled + sum([len(item.scored) for item in plan])
        read(plan, output.logits[sampled:scored], output.hidden[scored:])
        return Output(output.logits[:sampled], output.hidden[:sampled])

    @property
    def _tables(self) -> LowRankTables | None:
        return None if self._residency is None else self._residency.tables

    def _draft(
        self,
        sampling: Sequence[Scheduled],
        depths: Mapping[str, int],
        verdict: Verdict,
        hidden: Tensor,
        guide: GuideFor | None,
    ) -> _Drafted | None:
        """What heads expect after each item's last token. hidden [R, H]."""
        if not depths or self._residency is None:
            return None
        items = [
            DraftItem(row, item.heads, depth, item.components)
            for row, item in enumerate(sampling)
            if (depth := depths.get(item.sequence.request_id, 0)) and item.heads is not None
        ]
        if not items:
            return None
        drafts = self._drafter.draft(
            verdict.at_last_rows(hidden),
            verdict.token,
            items,
            self._residency,
            guide=guide([sampling[item.row] for item in items]) if guide is not None else None,
        )
        return _Drafted(items, drafts)

    def _forward(self, plan: Sequence[Scheduled], tables: LowRankTables | None) -> Output:
        """Of the rows that sample. tables: None where no row of the plan has an adapter."""
        adapters = tables is not None
        if self._graphs is not None:
            extent = self._buckets.fit(plan, adapters=adapters)
            if extent is not None:
                inputs = step_inputs(plan, extent, self._block_size)
                rows = sum([item.rows for item in plan])
                logits, hidden = self._graphs.run(extent, inputs, tables)
                return Output(logits[:rows], hidden[:rows])
        extent = exact_extent(plan, self._device, adapters=adapters)
        inputs = step_inputs(plan, extent, self._block_size)
        return self._compute(upload(inputs, self._device), tables)

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
        extent = Extent(rows, rows, rows, 1, None, None)
        inputs = upload(step_inputs((), extent, self._block_size), self._device)
        watch = stopwatch(self._device)
        watch.mark()
        logits = self._compute(inputs, None).logits
        watch.mark()
        logits[-1, -1].item()  # the device has got there
        return watch.seconds()[0]


class _Drafted(NamedTuple):
    items: list[DraftItem]
    drafts: Drafts


def _on_host(drafted: _Drafted | None, count: int) -> list[tuple[tuple[int, float], ...]]:
    """(token, chance) in order of depth, of each item that samples."""
    ahead: list[tuple[tuple[int, float], ...]] = [()] * count
    if drafted is None:
        return ahead
    tokens, chances = (part.tolist() for part in drafted.drafts)
    for item, own_tokens, own_chances in zip(drafted.items, tokens, chances, strict=True):
        pairs = zip(own_tokens, own_chances, strict=True)
        ahead[item.row] = tuple(pairs)[: item.depth]
    return ahead


def _sample_rows(item: Scheduled) -> list[SampleRow]:
    """Of the sequence's last token and each draft after it, as if the drafts before held."""
    sequence = item.sequence
    known, prompt = len(sequence.tokens), sequence.prompt_length
    tokens = [*sequence.tokens, *item.drafts] if item.drafts else sequence.tokens
    return [
        SampleRow(
            params=sequence.sampling,
            seed=sequence.seed,
            position=end,
            prompt=Window(tokens, 0, prompt),
            output=Window(tokens, prompt, end),
        )
        for end in range(known, known + item.sampled_rows)
    ]
