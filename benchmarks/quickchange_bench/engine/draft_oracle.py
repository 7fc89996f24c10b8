"""Oracles of drafting: what a replay could reach at best, with drafts of the same sources.

Both know the true prices, learn nothing and take no time of the host. In each step, of all
sequences' chains, they verify the drafts, and run the heads to the depth, that maximise the step's
tokens less its seconds at the rate which they reach in the long run.

`fates` knows which drafts hold: it verifies no other, and nothing can be faster. `rates` knows how
often drafts hold, by drafter, depth and confidence, over the whole recording, and what the heads
would say before they run: the most that a purchase can reach which has to guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from quickchange_bench.engine.draft_recording import HeadNode, RecordedTask, RecordedText
from quickchange_bench.engine.draft_replay import (
    BATCH_TOKENS,
    Played,
    PricedMachine,
    workload,
)
from quickchange_server.protocol import LOOKUP
from quickchange_server.spec_decode.acceptance_rates import DEEPEST, WORDS, confidence_bin
from quickchange_server.spec_decode.prompt_lookup import (
    LookupMatch,
    PromptLookup,
    TokenText,
    WordLookup,
)

Knows = Literal["fates", "rates"]

_HEADS = "heads"
_STRENGTH = 8.0  # weight of all depths' rate in that of one, in drafts
_END = -1  # what the last token of a text is to drafts: the step before it gives it as well
_ROUNDS = 4  # of finding the long-run rate

Tokens = tuple[int, ...]


class Offer(NamedTuple):
    """The best chain of a sequence if its heads draft to some depth at most."""

    heads: int  # drafts of the heads that it needs
    paths: tuple[float, ...]  # chance of each draft with all before it
    held: int  # drafts that hold


Offers = tuple[Offer, ...]  # by depth of the heads, from 0


class _Lookups:
    """The prompt's drafts behind the first tokens of one text, as it grows."""

    def __init__(self, text: RecordedText, words: TokenText, stop: Collection[int]) -> None:
        self.tokens = [*text.prompt]
        self._stop = stop
        self._by_tokens = PromptLookup(self.tokens)
        self._by_words = WordLookup(self.tokens, len(text.prompt), words)

    def found(self, most: int, after: Tokens = ()) -> Iterator[tuple[str, LookupMatch]]:
        """What lookup by tokens and by words find, with the names of their drafters."""
        for name, lookup in ((LOOKUP, self._by_tokens), (WORDS, self._by_words)):
            match = lookup.find(most, after)
            if match is not None:
                ends = next((i for i, t in enumerate(match.tokens) if t in self._stop), None)
                yield name, LookupMatch(match.tokens[:ends], match.match)


class HindsightRates:
    """Share of drafts that held where all before did, by drafter, depth and confidence."""

    def __init__(self, task: RecordedTask, words: TokenText) -> None:
        self._seen: Counter[tuple[str, int, int]] = Counter()  # depth 0: all depths
        self._held: Counter[tuple[str, int, int]] = Counter()
        for text in task.texts:
            lookups = _Lookups(text, words, task.stop)
            for at in range(len(text.output)):
                rest = text.output[at:]
                if at:
                    self._see_heads(text.drafts[at - 1], rest, task.stop)
                for name, match in lookups.found(DEEPEST):
                    held = _agreeing(match.tokens, rest)
                    for place in range(min(held + 1, len(match.tokens))):
                        self._see(name, place + 1, match.match + place, place < held)
                lookups.tokens.append(rest[0])

    def rate(self, name: str, depth: int, confidence: float) -> float:
        column = confidence_bin(name, confidence)
        every, one = (name, 0, column), (name, min(depth, DEEPEST), column)
        prior = (self._held[every] + 0.5) / (self._seen[every] + 1)
        return (self._held[one] + _STRENGTH * prior) / (self._seen[one] + _STRENGTH)

    def _see_heads(
        self, nodes: Mapping[Tokens, HeadNode], rest: Tokens, stop: Collection[int]
    ) -> None:
        for depth in range(1, len(rest) + 1):
            node = nodes.get(rest[: depth - 1])
            if node is None:
                return
            true = rest[depth - 1] if depth < len(rest) else _END
            if node.token not in stop:
                self._see(_HEADS, depth, node.chance, node.token == true)
            if node.word is not None:
                self._see(WORDS, depth, node.match, node.word == true)

    def _see(self, name: str, depth: int, confidence: float, held: bool) -> None:
        column = confidence_bin(name, confidence)
        for key in ((name, 0, column), (name, min(depth, DEEPEST), column)):
            self._seen[key] += 1
            self._held[key] += held


@dataclass(frozen=True)
class Oracle:
    """One task's offers at every place of every text, by what the oracle knows."""

    task: RecordedTask
    offers: tuple[tuple[Offers, ...], ...]  # by text and tokens of its output so far

    @classmethod
    def of(cls, task: RecordedTask, words: TokenText, knows: Knows) -> Oracle:
        rates = HindsightRates(task, words) if knows == "rates" else None
        return cls(task, tuple([tuple(_offers(task, t, words, rates)) for t in task.texts]))

    def best(self, lanes: int, machine: PricedMachine, rate: float) -> Played:
        """The replay at the long-run rate that it reaches itself. rate: a first guess."""
        best = self._played(lanes, machine, rate)
        for _ in range(_ROUNDS):
            again = self._played(lanes, machine, best.rate)
            if again.rate <= best.rate:
                break
            best = again
        return best

    def _played(self, lanes: int, machine: PricedMachine, rate: float) -> Played:
        asked = workload(self.task, lanes)
        running = [[text, 0] for text in islice(asked, lanes)]
        sums = Played()
        while True:
            offers = [self.offers[text][at] for text, at in running]
            step = _best_step(offers, machine, rate)
            for place, (_, at) in enumerate(running):
                running[place][1] = at + 1 + min(step.lengths[place], step.held[place])
                sums.tokens += running[place][1] - at
            sums.seconds += step.seconds
            sums.steps += 1
            sums.sequences += lanes
            sums.rows += sum(step.lengths)
            for place, (text, at) in enumerate(running):
                if at == len(self.task.texts[text].output):
                    following = next(asked, None)
                    if following is None:
                        return sums
                    running[place] = [following, 0]


class _Step(NamedTuple):
    lengths: list[int]
    held: list[int]
    seconds: float


def _best_step(offers: Sequence[Offers], machine: PricedMachine, rate: float) -> _Step:
    found: list[tuple[float, _Step]] = []
    rows = machine.rows(BATCH_TOKENS)
    for depth in range(len(offers[0])):
        chosen = [own[depth] for own in offers]
        if depth and all(own.heads < depth for own in chosen):
            continue  # a smaller depth does
        owners = np.repeat(np.arange(len(offers)), [len(own.paths) for own in chosen])
        paths = np.concatenate([np.array(own.paths) for own in chosen])
        order = np.argsort(-paths, kind="stable")[: BATCH_TOKENS - len(offers)]
        gains = np.concatenate(((0.0,), paths[order].cumsum()))
        drafting = machine.drafting([own.heads for own in chosen])
        seconds = rows[len(offers) : len(offers) + len(gains)] + drafting
        count = int(np.argmax(gains - rate * seconds))
        lengths = np.bincount(owners[order[:count]], minlength=len(offers)).tolist()
        worth = float(gains[count] - rate * seconds[count])
        held = [own.held for own in chosen]
        found.append((worth, _Step(lengths, held, float(seconds[count]))))
    return max(found, key=lambda one: one[0])[1]


def _offers(
    task: RecordedTask, text: RecordedText, words: TokenText, rates: HindsightRates | None
) -> Iterator[Offers]:
    """Offers behind each number of tokens of the output. rates: None if fates are known."""
    lookups = _Lookups(text, words, task.stop)
    for at in range(len(text.output)):
        rest = text.output[at:]
        nodes = text.drafts[at - 1] if at else {}
        best = [_chain(lookups, (), (), rest, rates)]
        heads: Tokens = ()
        chances: tuple[float, ...] = ()
        for level in range(1, task.depth + 1):
            node = nodes.get(heads)
            if node is None:
                break
            token, chance = _head_draft(node, rest[level - 1 : level], level, rates)
            if token in task.stop:
                break  # the row before it gives it as well
            if rates is None and _agreeing((*heads, token), rest) < level:
                break
            heads, chances = (*heads, token), (*chances, chance)
            chain = _chain(lookups, heads, chances, rest, rates)
            best.append(max(best[-1], chain, key=lambda own: sum(own.paths)))
        best += [best[-1]] * (task.depth + 1 - len(best))
        yield tuple(best)
        lookups.tokens.append(rest[0])


def _head_draft(
    node: HeadNode, true: Tokens, depth: int, rates: HindsightRates | None
) -> tuple[int, float]:
    """The head's draft, or the prompt's word in its place, and its chance."""
    if rates is None:
        return (node.word if node.word is not None and (node.word,) == true else node.token), 1.0
    own = rates.rate(_HEADS, depth, node.chance)
    if node.word is not None and (its := rates.rate(WORDS, depth, node.match)) > own:
        return node.word, its
    return node.token, own


def _chain(
    lookups: _Lookups,
    heads: Tokens,
    chances: tuple[float, ...],
    rest: Tokens,
    rates: HindsightRates | None,
) -> Offer:
    """The best chain of the heads' drafts `heads` with what the prompt has behind them."""
    chains = [Offer(len(heads), _products(chances), _agreeing(heads, rest))]
    most = DEEPEST - len(heads)
    for name, match in lookups.found(most, heads) if most > 0 else ():
        chain = (*heads, *match.tokens)
        held = _agreeing(chain, rest)
        if rates is None:
            chains.append(Offer(len(heads), (1.0,) * held, held))
            continue
        behind = [
            rates.rate(name, len(heads) + place + 1, match.match + place)
            for place in range(len(match.tokens))
        ]
        chains.append(Offer(len(heads), _products((*chances, *behind)), held))
    return max(chains, key=lambda own: sum(own.paths))


def _products(chances: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.cumprod(chances).tolist())


def _agreeing(chain: Tokens, rest: Tokens) -> int:
    """Drafts that hold: the last token of a text needs none."""
    held = 0
    while held < min(len(chain), len(rest) - 1) and chain[held] == rest[held]:
        held += 1
    return held
