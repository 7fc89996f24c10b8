"""Which tokens are drafted and verified in each step: what is offered, what it costs, what it gave.

An adapter's Turbo heads offer, which a step runs for the next one, and prompt lookup, by tokens and
by words; and a constraint, where it leaves one text to go on with. A sequence's chain is what
promises most of them, or of one after the other; words also take the place of single heads' drafts,
before the next head reads them (`phrase_lookup.py`). From all chains the step buys the drafts that
bring most tokens for their time (`draft_selection.py`), and what became of them is learned
(`acceptance_rates.py`, `cost_model.py`). None of it changes a token of the output.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from quickchange_server.engine.model_runner import Ran, Result
from quickchange_server.engine.scheduler import Scheduled
from quickchange_server.engine.sequence import HeadDrafts, Sequence
from quickchange_server.protocol import LOOKUP, DraftCount
from quickchange_server.spec_decode.acceptance_rates import (
    DEEPEST,
    FORCED,
    KEPT,
    WORDS,
    Acceptance,
    Drafter,
    Trials,
)
from quickchange_server.spec_decode.backoff import Guard
from quickchange_server.spec_decode.cost_model import DraftCost, StepCost
from quickchange_server.spec_decode.draft_depth import DepthPlan, Prospect
from quickchange_server.spec_decode.draft_selection import Load, buy_chains, expected_tokens
from quickchange_server.spec_decode.phrase_lookup import (
    GuidedChain,
    TokenText,
    WordGuide,
    WordLookup,
)
from quickchange_server.spec_decode.prompt_lookup import Found, PromptLookup
from quickchange_server.structured_output.compiler import Matcher

_REMEMBERED = 16  # chains
_UNSURE = 0.5  # a head's chance below which lookup may take over in the middle of a chain
_TRIED = 3  # drafts verified of a trial, at most
_PATIENCE = 4  # offers of a sequence in a row, none bought, before steps pass without one
_LONGEST_PAUSE = 32  # steps from one offer to the next
_QUIET = 4  # steps from one look to the next while nothing is drafted


class _Draft(NamedTuple):
    token: int
    drafter: Drafter
    confidence: float  # as Acceptance.chance has it
    chance: float  # that it holds, given that all before it do


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What a step's drafts came to."""

    counts: tuple[DraftCount, ...] = ()
    rows: int = 0
    estimate: float = 0.0  # tokens
    gain: int = 0  # tokens


class NoSpeculation:
    """Drafting switched off: no draft is made, bought or learned from."""

    def buy(self, plan: Seq[Scheduled], room: int) -> list[tuple[int, ...]]:
        del plan, room
        return []

    def depths(self, plan: Seq[Scheduled]) -> Mapping[str, int]:
        del plan
        return {}

    def guide(self, items: Seq[Scheduled]) -> None:
        """Never asked: no heads draft."""

    def observe(self, plan: Seq[Scheduled], ran: Ran) -> DraftReport:
        del plan, ran
        return DraftReport()


class Speculation:
    """Owner of what is known about drafters and prices. Everything on the engine's thread."""

    def __init__(
        self,
        cost: StepCost,
        head_count: Callable[[int], int],
        max_model_len: int,
        text: TokenText | None,
    ) -> None:
        """head_count: how many tokens the Turbo heads in a device slot draft. text: None where
        prompts are looked up by tokens alone."""
        self._cost = cost
        self._head_count = head_count
        self._max_model_len = max_model_len
        self._text = text
        self._draft_cost = DraftCost()
        self._acceptance = Acceptance()
        self._depth_plan = DepthPlan(self._acceptance, cost, self._draft_cost)
        self._trials = Trials()
        self._reach = _Reach()
        self._guard = Guard()
        self._awake = False  # whether the step under way may draft
        self._trial: str | None = None  # request whose drafts are verified whatever they are worth
        self._room = 0
        self._step = 0
        # of the step under way
        self._bought: dict[str, list[_Draft]] = {}
        self._lookups: dict[str, list[float]] = {}
        self._depths: dict[str, int] = {}
        self._guided: dict[str, GuidedChain] = {}
        self._estimate = 0.0

    def buy(self, plan: Seq[Scheduled], room: int) -> list[tuple[int, ...]]:
        """The drafts to verify for each item, or nothing for no item; at most `room` in all."""
        self._bought, self._lookups, self._estimate = {}, {}, 0.0
        self._step += 1
        decoding = sum([item.samples for item in plan])
        self._room = room
        wanted = any(item.sequence.drafting is not None for item in plan)
        self._awake = wanted and self._guard.awake(decoding)
        if not self._awake:
            return []
        chains = [self._chain(item)[: _TRIED if self._is_trial(item) else None] for item in plan]
        if not any(chains):
            return []
        load = Load(decoding, sum([item.count for item in plan]) - decoding, room)
        trial = next((i for i, item in enumerate(plan) if self._is_trial(item)), None)
        chances = [[draft.chance for draft in chain] for chain in chains]
        purchase = buy_chains(chances, load, self._cost, trial=trial)
        self._estimate = purchase.gain
        bought = []
        for index, (item, chain) in enumerate(zip(plan, chains, strict=True)):
            own = chain[: purchase.lengths[index]]
            bought.append(tuple([draft.token for draft in own]))
            if chain:
                item.sequence.unbought = 0 if own else item.sequence.unbought + 1
                self._reach.note(_drafters(item.sequence), len(own))
            if own:
                self._bought[item.sequence.request_id] = own
        return bought

    def depths(self, plan: Seq[Scheduled]) -> Mapping[str, int]:
        """How many tokens the heads are to draft for each request, after this step; none for most.

        Also decides whom the next step tries.
        """
        asleep = not self._depths and self._trial is None and self._step % _QUIET
        self._trial, self._depths, self._guided = None, {}, {}
        if asleep or not self._awake:
            return {}
        items = [item for item in plan if item.samples and item.sequence.drafting is not None]
        if not items:
            return {}
        due = self._trials.due(dict.fromkeys(d for item in items for d in _drafters(item.sequence)))
        prospects = [self._prospect(item) for item in items]
        decoding = sum([item.samples for item in plan])
        load = Load(decoding, 0, self._room + sum([len(item.drafts) for item in plan]))
        chosen = self._depth_plan.depths(prospects, load)
        for item, prospect, planned in zip(items, prospects, chosen, strict=True):
            key = item.sequence.request_id
            depth = min(planned, self._reach.of(prospect.drafter))
            if self._trial is None and due is not None and due in _drafters(item.sequence):
                self._trial = key
                if due == prospect.drafter:
                    depth = max(depth, min(_TRIED, prospect.deepest))
            if depth:
                self._depths[key] = depth
        return self._depths

    def guide(self, items: Seq[Scheduled]) -> WordGuide | None:
        """What revises the heads' drafts for these items, where any may be revised."""
        chains = [self._guided_chain(item.sequence) for item in items]
        if all(chain.lookup is None for chain in chains):
            return None
        self._guided = {
            item.sequence.request_id: chain for item, chain in zip(items, chains, strict=True)
        }
        return WordGuide(chains, self._acceptance)

    def observe(self, plan: Seq[Scheduled], ran: Ran) -> DraftReport:
        """Learn from a step that was computed as planned, before its tokens are taken, and note
        what the heads have drafted for the next one."""
        sampling = [item for item in plan if item.samples]
        for item, result in zip(sampling, ran.results, strict=True):
            self._keep(item.sequence, result)
        news = bool(self._bought) or self._step % _QUIET == 0
        if news and ran.seconds is not None and all(item.count == 1 for item in plan):
            self._cost.observe(sum([item.rows for item in plan]), ran.seconds)
        self._judge_step(plan, ran)
        if ran.draft_seconds is not None:
            self._draft_cost.observe(list(self._depths.values()), ran.draft_seconds)
        if not self._bought:
            return DraftReport()
        drafted: Counter[tuple[str, int]] = Counter()
        accepted: Counter[tuple[str, int]] = Counter()
        for item, result in zip(sampling, ran.results, strict=True):
            self._judge(item, result, drafted, accepted)
        return DraftReport(
            counts=tuple(
                DraftCount(name, depth, count, accepted[name, depth])
                for (name, depth), count in drafted.items()
            ),
            rows=drafted.total(),
            estimate=self._estimate,
            gain=accepted.total(),
        )

    def _keep(self, sequence: Sequence, result: Result) -> None:
        """Note what the heads have drafted behind the tokens that a sequence is about to take."""
        sequence.head_drafts = None
        if result.drafts:
            tokens, chances = zip(*result.drafts, strict=True)
            guided = self._guided.get(sequence.request_id)
            matches = (0,) * len(tokens) if guided is None else guided.matches[: len(tokens)]
            after = len(sequence.tokens) + len(result.sampled)
            sequence.head_drafts = HeadDrafts(after, tokens, chances, tuple(matches))

    def _judge_step(self, plan: Seq[Scheduled], ran: Ran) -> None:
        """Hold what a step of decoding alone gave against what it would have without drafts."""
        if not self._awake or ran.seconds is None or any(item.count != 1 for item in plan):
            return
        tokens = sum([len(result.sampled) for result in ran.results])
        seconds = ran.seconds + (ran.draft_seconds or 0.0)
        self._guard.observe(len(plan), tokens, seconds, self._cost.seconds(len(plan)))

    def _judge(
        self,
        item: Scheduled,
        result: Result,
        drafted: Counter[tuple[str, int]],
        accepted: Counter[tuple[str, int]],
    ) -> None:
        """Count one item's drafts, and learn from those whose turn came."""
        held = len(result.sampled) - 1
        chain = self._bought.get(item.sequence.request_id, [])
        for depth, draft in enumerate(chain[: len(item.drafts)], 1):
            counted = LOOKUP if draft.drafter.name in (WORDS, FORCED) else draft.drafter.name
            drafted[counted, depth] += 1
            accepted[counted, depth] += depth <= held
            if depth <= held + 1:
                holds = depth <= held
                self._acceptance.observe(draft.drafter, depth, draft.confidence, holds)
                if holds:
                    self._trials.held(draft.drafter)

    def _is_trial(self, item: Scheduled) -> bool:
        return item.sequence.request_id == self._trial

    def _prospect(self, item: Scheduled) -> Prospect:
        sequence = item.sequence
        known = self._lookups.get(sequence.request_id, ())
        if item.heads is None:
            return Prospect(known)
        deepest = min(self._head_count(item.heads), self._most(sequence))
        return Prospect(known, _heads_of(sequence), max(deepest, 0))

    def _most(self, sequence: Sequence) -> int:
        """Drafts that can still count: the last token of a sequence needs none."""
        left = sequence.request.sampling.token_limit - sequence.output_length
        return min(left, self._max_model_len - len(sequence.tokens), DEEPEST + 1) - 1

    def _chain(self, item: Scheduled) -> list[_Draft]:
        """The most promising chain of drafts for an item; empty where it has none."""
        sequence = item.sequence
        if sequence.drafting is None or not item.samples or item.count != 1:
            return []
        pause = min(1 + sequence.unbought // _PATIENCE, _LONGEST_PAUSE)
        if self._step % pause and not self._is_trial(item):
            return []  # looking costs time too
        most = self._most(sequence)
        if most < 1:
            return []
        heads = self._of_heads(sequence, most)
        offered = self._with_lookup(sequence, heads, most) if sequence.drafting.lookup else heads
        if sequence.matcher is None:
            return offered
        forced = self._of_constraint(sequence, sequence.matcher, most)
        return max(_lawful(sequence.matcher, offered), forced, key=_expected)

    def _with_lookup(self, sequence: Sequence, heads: list[_Draft], most: int) -> list[_Draft]:
        """What the prompt promises, alone or behind the heads' drafts."""
        if not heads:
            alone = self._of_prompt(sequence, (), most)
            self._lookups[sequence.request_id] = [draft.chance for draft in alone]
            return alone
        # Lookup goes on where the heads end, or where they are least sure.
        weakest = min(range(len(heads)), key=lambda i: heads[i].chance)
        cuts = {len(heads), weakest if heads[weakest].chance < _UNSURE else len(heads)}
        joined = [
            [*heads[:cut], *self._of_prompt(sequence, heads[:cut], most - cut)] for cut in cuts
        ]
        return max([heads, *joined], key=_expected)

    def _of_heads(self, sequence: Sequence, most: int) -> list[_Draft]:
        made = sequence.head_drafts
        if made is None or made.after != len(sequence.tokens):
            return []
        heads = _heads_of(sequence)
        if heads is None:
            return []
        words = Drafter(WORDS, sequence.key)
        drafts = []
        for depth, token in enumerate(made.tokens, 1):
            match = made.matches[depth - 1]
            drafter, confidence = (words, match) if match else (heads, made.chances[depth - 1])
            chance = self._acceptance.chance(drafter, depth, confidence)
            drafts.append(_Draft(token, drafter, confidence, chance))
        sure = [d.confidence if d.drafter is heads else d.chance for d in drafts]
        self._acceptance.offered(heads, sure)
        return drafts[:most]

    def _of_constraint(self, sequence: Sequence, matcher: Matcher, most: int) -> list[_Draft]:
        drafter = Drafter(FORCED, sequence.key)
        return [
            _Draft(token, drafter, 1, self._acceptance.chance(drafter, depth, 1))
            for depth, token in enumerate(matcher.forced()[:most], 1)
        ]

    def _of_prompt(self, sequence: Sequence, after: Seq[_Draft], most: int) -> list[_Draft]:
        """What the prompt promises behind the drafts `after`, by tokens or by text."""
        tokens = [draft.token for draft in after]
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(sequence.tokens)
        chains = [self._found(sequence.lookup.find(most, tokens), _lookup_of(sequence), len(after))]
        words = self._words(sequence)
        if words is not None:
            found = words.find(most, tokens)
            chains.append(self._found(found, Drafter(WORDS, sequence.key), len(after)))
        return max(chains, key=_expected)

    def _found(self, found: Found | None, drafter: Drafter, before: int) -> list[_Draft]:
        """Drafts of a lookup, `before` others standing before them."""
        if found is None:
            return []
        drafts = []
        for place, token in enumerate(found.tokens):
            match = found.match + place
            chance = self._acceptance.chance(drafter, before + place + 1, match)
            drafts.append(_Draft(token, drafter, match, chance))
        return drafts

    def _words(self, sequence: Sequence) -> WordLookup | None:
        if sequence.words is None and self._text is not None:
            sequence.words = WordLookup(sequence.tokens, len(sequence.request.prompt), self._text)
        return sequence.words

    def _guided_chain(self, sequence: Sequence) -> GuidedChain:
        heads = _heads_of(sequence)
        if heads is None or sequence.drafting is None:
            raise RuntimeError(f"{sequence.request_id} has drafts of heads that it does not have")
        lookup = self._words(sequence) if sequence.drafting.lookup else None
        depth = self._depths[sequence.request_id]
        return GuidedChain(lookup, heads, Drafter(WORDS, sequence.key), depth)


class _Reach:
    """How deep drafters' chains were bought lately: what heads draft beyond is seldom of use."""

    def __init__(self) -> None:
        self._lengths: dict[Drafter, deque[int]] = {}

    def note(self, drafters: Seq[Drafter], length: int) -> None:
        """So much was bought of a chain of these."""
        for drafter in drafters:
            lengths = self._lengths.setdefault(drafter, deque(maxlen=_REMEMBERED))
            lengths.append(length)
        while len(self._lengths) > KEPT:
            del self._lengths[next(iter(self._lengths))]

    def of(self, drafter: Drafter | None) -> int:
        """The depth to which drafting may pay: one more than was bought lately."""
        lengths = None if drafter is None else self._lengths.get(drafter)
        return DEEPEST if lengths is None or len(lengths) < _REMEMBERED else max(lengths) + 1


def _lawful(matcher: Matcher, chain: list[_Draft]) -> list[_Draft]:
    """The chain down to the first draft that a constraint forbids."""
    return chain and chain[: matcher.allowed([draft.token for draft in chain])]


def _expected(chain: Seq[_Draft]) -> float:
    """Tokens that a chain brings, if all of it is verified."""
    return expected_tokens([draft.chance for draft in chain])


def _heads_of(sequence: Sequence) -> Drafter | None:
    return None if sequence.heads is None else Drafter(sequence.heads, sequence.key)


def _lookup_of(sequence: Sequence) -> Drafter:
    return Drafter(LOOKUP, sequence.key)


def _drafters(sequence: Sequence) -> list[Drafter]:
    """All that draft for it."""
    heads = _heads_of(sequence)
    lookup = sequence.drafting is not None and sequence.drafting.lookup
    return [*([] if heads is None else [heads]), *([_lookup_of(sequence)] if lookup else [])]
