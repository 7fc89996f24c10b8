"""Steps that an engine computes before it serves, and the count of what they left undone.

Where kernels are compiled when they are first launched, every kernel that a request could need is
launched here: chunks of prompts of each size class, every kind of sampling, verification, draft
heads, prompts that are read. What is computed is thrown away; blocks, states and adapter slots hold
nothing yet. Whatever is compiled or captured afterwards is late: counted, and warned of.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from quickchange_kernels.compile_watch import CompileWatch
from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.sampling.verify import MAX_ROWS
from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadTables
from quickchange_server.adapters.turbo_tables import TurboSlot
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.model.architectures.position_scaling import PositionScaling
from quickchange_server.model.forward_context import FIRST_STATE
from quickchange_server.protocol import Pooling, SamplingParams, Submit

logger = logging.getLogger(__name__)

# Rows of a prompt's chunk at which launches change: tiles of 16 and 64 rows, 64 rows of a split.
_CHUNKS = (2, 3, 16, 17, 64, 65, 128, 129)
_FILTERS = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}
_EDITS = {"logit_bias": {0: 1.0}}
_SCORES = 20  # of a row, at most
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that the engine may plan."""

    rows: int
    sequences: int
    context: int  # tokens of one sequence, for which the cache has room
    block_size: int
    state_rows: int  # for sequences and their drafts, of a model with recurrent layers; else 0
    adapters: bool
    drafts: bool
    scaling: PositionScaling | None = None


def steps(limits: StepLimits) -> Iterator[list[Scheduled]]:
    """Plans that launch, together, every kernel of forward pass, sampling and verification."""
    for plan in _plans(limits):
        yield plan[: limits.sequences]


def largest_steps(limits: StepLimits) -> Iterator[list[Scheduled]]:
    """Plans that take most memory: prompts whose rows are all scored, then as many sampled rows as
    there are. All sequences hold one block and one state, again and again."""
    make = _Items(limits, everywhere=0)
    components = ((0, 1.0),) if limits.adapters else ()
    scored = SamplingParams(prompt_logprobs=_SCORES, max_tokens=1)
    prompts: list[Scheduled] = []
    left = limits.rows
    while left > 0 and len(prompts) < limits.sequences:
        prompts.append(make.item(min(left, limits.context - 1), components, scored))
        left -= prompts[-1].count
    yield prompts
    sampled = SamplingParams(
        logprobs=_SCORES,
        **{"temperature": 1.0, **_FILTERS, **_EDITS},  # type: ignore[arg-type]
    )
    most = min(limits.sequences, limits.rows)
    yield [make.item(1, components, sampled) for _ in range(most)]


def _plans(limits: StepLimits) -> Iterator[list[Scheduled]]:
    make = _Items(limits)
    for components in ((), ((0, 1.0),)) if limits.adapters else ((),):
        for rows in (*_CHUNKS, limits.rows):
            if rows < min(limits.rows, limits.context) or rows == limits.rows:
                chunk = min(rows, limits.context - 1)
                yield [make.item(chunk, components)]
                yield [make.item(1, components), make.item(chunk, components)]
        yield [make.item(1, components) for _ in range(2)]
        for count in _draft_counts(limits):
            yield [make.item(1, components, drafts=count), make.item(1, components)]
        for read in (SamplingParams(prompt_logprobs=1, max_tokens=1), "last", "mean"):
            yield [make.item(min(4, limits.context - 1), components, read)]
    for sampling in sampling_kinds():
        yield [make.item(1, (), sampling)]


def sampling_kinds() -> Iterator[SamplingParams]:
    """Every set of filters, drawn from logits that are edited or not; greedy ones; and reports."""
    for edits in ({}, _EDITS):
        yield SamplingParams(temperature=0.0, **edits)  # type: ignore[arg-type]
        for count in range(len(_FILTERS) + 1):
            for names in itertools.combinations(_FILTERS, count):
                filters = {name: _FILTERS[name] for name in names}
                yield SamplingParams(temperature=1.0, **filters, **edits)  # type: ignore[arg-type]
    yield SamplingParams(temperature=1.0, logprobs=1)


def _draft_counts(limits: StepLimits) -> Iterable[int]:
    """Drafts of one sequence: one for each power of two that its rows round up to."""
    most = min(MAX_ROWS, limits.rows, limits.context - 1) if limits.drafts else 0
    if limits.state_rows:
        most = min(most, limits.state_rows)
    return [rows - 1 for rows in (2, 4, 8, 16, 32, 64, 128) if rows <= most]


class _Items:
    """Makes items whose sequences hold the cache's first blocks, all the same ones."""

    def __init__(self, limits: StepLimits, everywhere: int | None = None) -> None:
        """everywhere: the block that takes the place of all."""
        self._limits = limits
        self._everywhere = everywhere
        self._made = itertools.count()

    def item(
        self,
        rows: int,
        components: tuple[tuple[int, float], ...],
        asked: SamplingParams | Pooling = _GREEDY,
        drafts: int = 0,
    ) -> Scheduled:
        """A sequence whose prompt of `rows` tokens is computed whole."""
        sampling, pooling = (asked, None) if isinstance(asked, SamplingParams) else (_GREEDY, asked)
        name = f"warm-up {next(self._made)}"
        submit = Submit(name, (0,) * rows, sampling, pooling=pooling, seed=0)
        sequence = Sequence(submit, 0.0, self._limits.scaling)
        sequence.blocks = [*range(-(-(rows + drafts) // self._limits.block_size))]
        if self._everywhere is not None:
            sequence.blocks = [self._everywhere] * len(sequence.blocks)
        if self._limits.state_rows:
            sequence.states = [FIRST_STATE + place for place in range(1 + drafts)]
        return Scheduled(sequence, rows, components, drafts=(0,) * drafts)


class HeadLayouts(Protocol):
    """The tables that heads on the device are read through."""

    @property
    def wide_tables(self) -> LowRankTables: ...

    @property
    def heads(self) -> HeadTables: ...


class BlankHeads:
    """Heads whose matrices have no pages, in one slot for each way in which heads can be made."""

    def __init__(self, layouts: HeadLayouts, tokens: int) -> None:
        """tokens: the base's vocabulary."""
        self._layouts = layouts
        self.slots = [*_blank_turbos(layouts.heads.arena.device, tokens)]

    @property
    def wide_tables(self) -> LowRankTables:
        return self._layouts.wide_tables

    @property
    def heads(self) -> HeadTables:
        return self._layouts.heads

    def turbo(self, slot: int) -> TurboSlot | None:
        return self.slots[slot]

    def updates(self, slot: int, group: int) -> bool:  # noqa: ARG002  of no adapter
        return False


def _blank_turbos(device: torch.device, tokens: int) -> Iterator[TurboSlot]:
    """Parallel and sequential heads of two blocks, with each kind of logits."""
    for sequential, width in itertools.product((False, True), (None, 32, 33)):
        vocabulary = None
        if width is not None:
            vocabulary = torch.zeros(width, dtype=torch.int32, device=device)
        for outputs in ((), (0, 0)):
            columns = tokens if outputs and width is None else width
            yield TurboSlot(((0, 0), (0, 0)), sequential, outputs, columns, vocabulary)


class Captures(Protocol):
    """Whoever captures graphs."""

    @property
    def captures(self) -> int:
        """Number of graphs captured so far."""
        ...


class LateWork:
    """Counts kernels compiled and graphs captured from now on, while requests wait for them."""

    def __init__(self, captures: Captures, watch: CompileWatch | None) -> None:
        """watch: None where no kernel is compiled."""
        self._captures = captures
        self._watch = watch
        self._before = self._told = captures.captures

    @property
    def compiled(self) -> int:
        return 0 if self._watch is None else self._watch.compiled

    @property
    def captured(self) -> int:
        return self._captures.captures - self._before

    def note(self, plan: Seq[Scheduled]) -> None:
        """Warn of graphs captured in the step of this plan."""
        now = self._captures.captures
        if now != self._told:
            logger.warning(
                "%d graphs were captured while requests waited, in a step of %d rows of %d "
                "sequences under %d adapters: please report this",
                now - self._told,
                sum([item.rows for item in plan]),
                len(plan),
                len({slot for item in plan for slot, _ in item.components}),
            )
            self._told = now

    def close(self) -> None:
        """Watch no longer."""
        if self._watch is not None:
            self._watch.close()
