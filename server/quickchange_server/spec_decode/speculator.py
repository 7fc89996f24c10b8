"""Speculation: the tokens drafted and verified in each step, their cost and their acceptance.

Each sequence has a chain of drafts (`proposer.py`); words of the prompt also take the place of
single heads' drafts, before the next head reads them (`prompt_lookup.py`). From all chains the step
buys the drafts that bring most tokens for their time (`draft_selection.py`) and learns from their
verification (`acceptance_rates.py`, `cost_model.py`); where drafting does not pay it rests
(`backoff.py`). None of it changes a token of the output.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from quickchange_server.protocol import LOOKUP, DraftCount
from quickchange_server.spec_decode.acceptance_rates import FORCED, WORDS, Acceptance, Drafter
from quickchange_server.spec_decode.backoff import Backoff
from quickchange_server.spec_decode.cost_model import DraftCost, StepCost
from quickchange_server.spec_decode.draft_depth import DepthPlan, Prospect
from quickchange_server.spec_decode.draft_selection import StepLoad, buy_chains
from quickchange_server.spec_decode.prompt_lookup import GuidedChain, TokenText, WordGuide
from quickchange_server.spec_decode.proposer import Draft, Proposer, heads_of
from quickchange_server.spec_decode.step_view import (
    DraftedSequence,
    HeadDrafts,
    ItemResult,
    PlannedItem,
    StepResult,
)

_TRIED = 3  # most drafts verified in a trial


@dataclass(frozen=True, slots=True)
class DraftReport:
    """Drafts of a step: counts, expected gain and gain."""

    counts: tuple[DraftCount, ...] = ()
    rows: int = 0
    estimate: float = 0.0  # tokens expected
    gain: int = 0  # tokens accepted


@dataclass(slots=True)
class StepDrafts:
    """What was decided about the drafts of one step, kept until its results are there."""

    awake: bool = False  # True if the step may draft
    room: int = 0  # rows that were left for drafts
    bought: dict[str, list[Draft]] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    guided: dict[str, GuidedChain] = field(default_factory=dict)
    estimate: float = 0.0
    host: float = 0.0  # seconds that deciding took


_NO_DRAFTS = StepDrafts()


class NoSpeculation:
    """Null object of an engine that does not draft."""

    def buy(self, plan: Seq[PlannedItem], room: int) -> list[tuple[int, ...]]:
        del plan, room
        return []

    def depths(self, plan: Seq[PlannedItem]) -> Mapping[str, int]:
        del plan
        return {}

    def guide(self, items: Seq[PlannedItem]) -> None:
        """Never asked: no heads draft."""

    def under_way(self) -> StepDrafts:
        return _NO_DRAFTS

    def observe(self, plan: Seq[PlannedItem], ran: StepResult, drafts: StepDrafts) -> DraftReport:
        del plan, ran, drafts
        return DraftReport()


class Speculation:
    """Drafting of one engine, with all that it learns. Everything runs on the engine's thread."""

    def __init__(
        self,
        cost: StepCost,
        head_count: Callable[[int], int],
        max_model_len: int,
        text: TokenText | None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """head_count: number of tokens that the Turbo heads in a device slot draft. text: None:
        prompts are looked up by tokens alone. clock: seconds that this thread has worked."""
        self._cost = cost
        self._head_count = head_count
        self._draft_cost = DraftCost()
        self._acceptance = Acceptance()
        self._proposer = Proposer(self._acceptance, max_model_len, text)
        self._depth_plan = DepthPlan(self._acceptance, cost, self._draft_cost)
        self._backoff = Backoff()
        self._clock = clock
        self._trial: str | None = None  # request whose drafts are verified at any cost
        self._step = StepDrafts()  # the one that is being prepared, or was last

    def under_way(self) -> StepDrafts:
        """The decisions of the step that was launched last; `observe` reads them."""
        return self._step

    def buy(self, plan: Seq[PlannedItem], room: int) -> list[tuple[int, ...]]:
        """Drafts to verify for each item, at most `room` in all; an empty list: none at all."""
        begun = self._clock()
        step = self._step = StepDrafts(room=room)
        bought = self._buy(plan, step)
        step.host += self._clock() - begun
        return bought

    def _buy(self, plan: Seq[PlannedItem], step: StepDrafts) -> list[tuple[int, ...]]:
        self._proposer.alone.clear()
        decoding = sum([item.samples for item in plan])
        wanted = any(item.sequence.drafting is not None for item in plan)
        step.awake = wanted and self._backoff.awake(decoding)
        if not step.awake:
            return []
        chains = [self._chain(item) for item in plan]
        if not any(chains):
            return []
        load = StepLoad(decoding, sum([item.count for item in plan]) - decoding, step.room)
        trial = next((i for i, item in enumerate(plan) if self._is_trial(item)), None)
        chances = [[draft.chance for draft in chain] for chain in chains]
        purchase = buy_chains(chances, load, self._cost, trial=trial)
        step.estimate = purchase.gain
        bought = []
        for index, (item, chain) in enumerate(zip(plan, chains, strict=True)):
            own = chain[: purchase.lengths[index]]
            bought.append(tuple([draft.token for draft in own]))
            if own:
                step.bought[item.sequence.request_id] = own
        return bought

    def depths(self, plan: Seq[PlannedItem]) -> Mapping[str, int]:
        """Draft depth of the heads after this step by request id; without drafts: left out.

        Also chooses the drafter that the next step tries.
        """
        begun = self._clock()
        self._trial, step = None, self._step
        if step.awake:
            self._plan_depths(plan, step)
        step.host += self._clock() - begun
        return step.depths

    def _plan_depths(self, plan: Seq[PlannedItem], step: StepDrafts) -> None:
        items = [item for item in plan if item.samples and item.sequence.drafting is not None]
        if not items:
            return
        due = self._backoff.due(
            dict.fromkeys(d for item in items for d in _drafters(item.sequence))
        )
        prospects = [self._prospect(item) for item in items]
        decoding = sum([item.samples for item in plan])
        load = StepLoad(decoding, 0, step.room + sum([len(item.drafts) for item in plan]))
        chosen = self._depth_plan.depths(prospects, load)
        for item, prospect, planned in zip(items, prospects, chosen, strict=True):
            key = item.sequence.request_id
            depth = planned
            if self._trial is None and due is not None and due in _drafters(item.sequence):
                self._trial = key
                if due == prospect.drafter:
                    depth = max(depth, min(_TRIED, prospect.deepest))
            if depth:
                step.depths[key] = depth

    def guide(self, items: Seq[PlannedItem]) -> WordGuide | None:
        """The guide that revises the heads' drafts for these items; None: they stay."""
        chains = [self._guided_chain(item) for item in items]
        if all(chain.lookup is None for chain in chains):
            return None
        self._step.guided = {
            item.sequence.request_id: chain for item, chain in zip(items, chains, strict=True)
        }
        return WordGuide(chains, self._acceptance)

    def observe(self, plan: Seq[PlannedItem], ran: StepResult, drafts: StepDrafts) -> DraftReport:
        """Learn from a computed step, before its tokens are taken; keep the heads' new drafts.

        drafts: `under_way` when the step was launched.
        """
        begun = self._clock()
        report = self._learn(plan, ran, drafts)
        drafts.host += self._clock() - begun
        self._judge_step(plan, ran, drafts)
        return report

    def _learn(self, plan: Seq[PlannedItem], ran: StepResult, drafts: StepDrafts) -> DraftReport:
        sampling = [item for item in plan if item.samples]
        for item, result in zip(sampling, ran.results, strict=True):
            self._keep(item.sequence, result, drafts)
        if ran.seconds is not None and all(item.count == 1 for item in plan):
            self._cost.observe(sum([item.rows for item in plan]), ran.seconds)
        if ran.draft_seconds is not None:
            self._draft_cost.observe(list(drafts.depths.values()), ran.draft_seconds)
        if not drafts.bought:
            return DraftReport()
        drafted: Counter[tuple[str, int]] = Counter()
        accepted: Counter[tuple[str, int]] = Counter()
        for item, result in zip(sampling, ran.results, strict=True):
            self._judge(item, result, drafts, drafted, accepted)
        return DraftReport(
            counts=tuple(
                DraftCount(name, depth, count, accepted[name, depth])
                for (name, depth), count in drafted.items()
            ),
            rows=drafted.total(),
            estimate=drafts.estimate,
            gain=accepted.total(),
        )

    def _keep(self, sequence: DraftedSequence, result: ItemResult, drafts: StepDrafts) -> None:
        """Keep the heads' drafts behind the tokens that a sequence is about to take."""
        sequence.head_drafts = None
        if result.drafts:
            tokens, chances = zip(*result.drafts, strict=True)
            guided = drafts.guided.get(sequence.request_id)
            matches = (0,) * len(tokens) if guided is None else guided.matches[: len(tokens)]
            after = len(sequence.tokens) + len(result.sampled)
            sequence.head_drafts = HeadDrafts(after, tokens, chances, tuple(matches))

    def _judge_step(self, plan: Seq[PlannedItem], ran: StepResult, drafts: StepDrafts) -> None:
        """Compare a decode step's tokens a second with those of no drafts, for the back-off."""
        if not drafts.awake or ran.seconds is None or any(item.count != 1 for item in plan):
            return
        tokens = sum([len(result.sampled) for result in ran.results])
        seconds = ran.seconds + (ran.draft_seconds or 0.0) + drafts.host
        self._backoff.observe(len(plan), tokens, seconds, self._cost.seconds(len(plan)))

    def _judge(
        self,
        item: PlannedItem,
        result: ItemResult,
        drafts: StepDrafts,
        drafted: Counter[tuple[str, int]],
        accepted: Counter[tuple[str, int]],
    ) -> None:
        """Count one item's drafts, and learn from those up to the first rejected."""
        held = len(result.sampled) - 1
        chain = drafts.bought.get(item.sequence.request_id, [])[: len(item.drafts)]
        for depth, draft in enumerate(chain, 1):
            name = draft.drafter.name
            counted = LOOKUP if name in (WORDS, FORCED) else name, depth
            drafted[counted] += 1
            accepted[counted] += depth <= held
            if depth <= held + 1:
                self._acceptance.observe(draft.drafter, depth, draft.confidence, depth <= held)
        for drafter in {draft.drafter for draft in chain[:held]}:
            self._backoff.held(drafter)

    def _is_trial(self, item: PlannedItem) -> bool:
        return item.sequence.request_id == self._trial

    def _prospect(self, item: PlannedItem) -> Prospect:
        sequence = item.sequence
        known = self._proposer.alone.get(sequence.request_id, ())
        if item.heads is None:
            return Prospect(known)
        deepest = min(self._head_count(item.heads), self._proposer.most(sequence))
        return Prospect(known, heads_of(sequence), max(deepest, 0))

    def _chain(self, item: PlannedItem) -> list[Draft]:
        """The most promising chain of drafts for an item; empty if it has none."""
        if item.sequence.drafting is None or not item.samples or item.count != 1:
            return []
        chain = self._proposer.chain(item.sequence)
        return chain[:_TRIED] if self._is_trial(item) else chain

    def _guided_chain(self, item: PlannedItem) -> GuidedChain:
        sequence = item.sequence
        heads = heads_of(sequence)
        if heads is None or sequence.drafting is None:
            raise RuntimeError(f"{sequence.request_id} has drafts of heads that it does not have")
        lookup = self._proposer.words(sequence) if sequence.drafting.lookup else None
        depth = self._step.depths[sequence.request_id]
        return GuidedChain(lookup, heads, Drafter(WORDS, sequence.key), depth, item.drafts)


def _drafters(sequence: DraftedSequence) -> list[Drafter]:
    """All drafters of a sequence."""
    heads = heads_of(sequence)
    lookup = sequence.drafting is not None and sequence.drafting.lookup
    return [
        *([] if heads is None else [heads]),
        *([Drafter(LOOKUP, sequence.key)] if lookup else []),
    ]
