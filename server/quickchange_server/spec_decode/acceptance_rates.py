"""Acceptance rates of drafts: running means by drafter, depth and confidence, with decay.

A draft's chance is always that it is accepted *given that all before it were*. What is known of one
drafter at one depth and confidence is drawn towards what is known of it at other depths, and this
towards all drafters of its kind, so that new adapters start sensibly. Counts decay with each
observation of the drafter, wherever it falls: what is no longer observed gives way to what is.
Knows nothing of models, rows or time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from quickchange_server.protocol import LOOKUP

DEEPEST = 16  # depths kept apart; deeper drafts count as this deep
WORDS = "words"  # Drafter.name of drafts found in the prompt by their text
FORCED = "forced"  # Drafter.name of drafts whose text a constraint forces
KEPT = 1_024  # drafters remembered, the latest used

HALF_LIFE = 512  # observations of a drafter after which one weighs half
STRENGTH = 8.0  # weight of the coarser level's mean, in observations
KIND_STRENGTH = 32.0  # weight of a kind's first guess, in observations

_HEADS_EDGES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # bounds of the heads' own probability
_HEADS_PRIOR = (0.05, 0.18, 0.33, 0.48, 0.63, 0.78, 0.9, 0.97)  # near the probability itself
_LOOKUP_PRIOR = (0.1, 0.25, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7)  # matches of 1, 2, … tokens
_WORDS_PRIOR = (
    0.6,
    0.3,
    0.8,
    0.8,
    0.8,
    0.8,
    0.5,
    0.5,
)  # matches of 1, 2, … characters; long words may end
BINS = len(_HEADS_PRIOR)
_FORCED_PRIOR = (0.9,) * BINS  # text is mostly spelled as the tokenizer spells it

_HEADS = "heads"
_PRIORS = {  # by kind
    _HEADS: _HEADS_PRIOR,
    LOOKUP: _LOOKUP_PRIOR,
    WORDS: _WORDS_PRIOR,
    FORCED: _FORCED_PRIOR,
}

OFFERS = 16  # latest chains of a drafter that are remembered
HOPEFUL = 0.5  # part of the posterior's deviation that is added: early bad luck ends no drafter
HOPE = 0.95  # chance of what was not offered yet, so that it is tried
STALE = 8  # most observations of a drafter for which its chances are kept as they are
_UNSEEN, _ENDED = BINS, BINS + 1  # in place of a bin: not offered yet; behind a text's end


class Drafter(NamedTuple):
    """A source of drafts for one composition: heads fare differently on another adapter."""

    name: str  # digest of the adapter version whose heads draft, LOOKUP, WORDS or FORCED
    composition: bytes  # key of the adapters that verify


class _Means:
    """Decayed acceptance rates in some cells, under one clock that each observation turns.

    Decay is a growing weight of new observations, so that only the observed cell is touched.
    """

    _GROWTH = 2 ** (1 / HALF_LIFE)
    _LARGEST = 2.0**64  # weights are scaled down before they lose precision

    def __init__(self, cells: int) -> None:
        self._held = [0.0] * cells
        self._seen = [0.0] * cells
        self._weight = 1.0  # weight of the next observation

    def turn(self) -> None:
        self._weight *= self._GROWTH
        if self._weight > self._LARGEST:
            self._held = [held / self._weight for held in self._held]
            self._seen = [seen / self._weight for seen in self._seen]
            self._weight = 1.0

    def add(self, cell: int, held: bool) -> None:
        self._seen[cell] += self._weight
        if held:
            self._held[cell] += self._weight

    def seen(self, cell: int) -> float:
        """Observations in a cell, decayed."""
        return self._seen[cell] / self._weight

    def mean(self, cell: int, prior: float, strength: float) -> float:
        """Posterior mean of a cell, with `prior` worth `strength` observations."""
        worth = strength * self._weight
        return (self._held[cell] + worth * prior) / (self._seen[cell] + worth)

    def mean_without(self, cells: int, cell: int, prior: float, strength: float) -> float:
        """`mean` of the cell `cells` without the observations that it shares with `cell`."""
        worth = strength * self._weight
        held = self._held[cells] - self._held[cell]
        return (held + worth * prior) / (self._seen[cells] - self._seen[cell] + worth)


class DrafterHistory:
    """Observations of one drafter. Cells: BINS over all depths, then BINS for each depth."""

    def __init__(self, name: str, kind: _Means) -> None:
        """kind: of all drafters of the kind, which each observation reaches as well."""
        self._name = name
        self._kind = kind
        self._first_guess = _PRIORS[_kind(name)]
        self._means = _Means(BINS * (1 + DEEPEST))
        self._chances: dict[int, float] = {}  # by cell, as last worked out
        self._observed = 0
        self._worked_out_until = 0  # observations up to which `_chances` are good enough
        # [offer, depth] bin, _UNSEEN or _ENDED
        self._offers = np.full((OFFERS, DEEPEST), _UNSEEN)
        self._next_offer = 0

    def chance(self, depth: int, confidence: float) -> float:
        """`Acceptance.chance` of the drafter's."""
        return self._chance(depth, confidence_bin(self._name, confidence))

    def observe(self, depth: int, confidence: float, held: bool) -> None:
        column = confidence_bin(self._name, confidence)
        self._kind.turn()
        self._kind.add(column, held)
        self._means.turn()
        self._means.add(column, held)
        self._means.add(BINS * min(depth, DEEPEST) + column, held)
        self._observed += 1
        if self._observed > self._worked_out_until:
            self._chances.clear()
            self._worked_out_until = self._observed + min(self._observed // 16, STALE)

    def offered(self, confidences: Sequence[float], *, ends: bool) -> None:
        columns = [confidence_bin(self._name, one) for one in confidences[:DEEPEST]]
        offer = self._offers[self._next_offer]
        offer[: len(columns)] = columns
        if ends:
            offer[len(columns) :] = _ENDED
        self._next_offer = (self._next_offer + 1) % OFFERS

    def expected(self, deepest: int) -> NDArray[np.float64]:
        table = np.array(
            [
                [*(self._chance(depth, column) for column in range(BINS)), HOPE, 0.0]
                for depth in range(1, deepest + 1)
            ]
        )
        chances: NDArray[np.float64] = table[np.arange(deepest), self._offers[:, :deepest]]
        return chances

    def _chance(self, depth: int, column: int) -> float:
        cell = BINS * min(depth, DEEPEST) + column
        chance = self._chances.get(cell)
        if chance is None:
            chance = self._chances[cell] = self._worked_out(cell, column)
        return chance

    def _worked_out(self, cell: int, column: int) -> float:
        """Chance of a cell: its own mean, drawn towards that of other depths, and of the kind."""
        means = self._means
        prior = self._kind.mean(column, self._first_guess[column], KIND_STRENGTH)
        others = means.mean_without(column, cell, prior, STRENGTH)
        mean = means.mean(cell, others, STRENGTH)
        deviation = sqrt(mean * (1 - mean) / (means.seen(cell) + STRENGTH))
        return mean + HOPEFUL * deviation * (1 - mean)


class Acceptance:
    """Chances of drafts, learned from verified ones.

    confidence: of heads, the draft's own probability; of lookup, the number of tokens, or
    characters, that matched; of forced drafts, 1. depth: from 1.
    """

    def __init__(self) -> None:
        self._kinds = {kind: _Means(BINS) for kind in _PRIORS}  # over all drafters of the kind
        self._drafters: LRUCache[Drafter, DrafterHistory] = LRUCache(KEPT)

    def chance(self, drafter: Drafter, depth: int, confidence: float) -> float:
        """Chance in (0, 1) that a draft is accepted, given that all before it were."""
        return self.of(drafter).chance(depth, confidence)

    def observe(self, drafter: Drafter, depth: int, confidence: float, held: bool) -> None:
        """Learn from a verified draft before which all were accepted. held: it was accepted."""
        self.of(drafter).observe(depth, confidence, held)

    def offered(
        self, drafter: Drafter, confidences: Sequence[float], *, ends: bool = False
    ) -> None:
        """Note a chain drafted from depth 1, bought or not. ends: nothing can follow it."""
        self.of(drafter).offered(confidences, ends=ends)

    def expected(self, drafter: Drafter, deepest: int) -> NDArray[np.float64]:
        """Chances [OFFERS, deepest] of the last chains offered, each given those before it.

        Whole chains and not means by depth: a drafter that is sure half of the time is worth its
        rows where one that is half sure all of the time is not. Where fewer chains were offered, or
        not so deep, HOPE stands for what is missing. deepest: from 1 to DEEPEST.
        """
        return self.of(drafter).expected(deepest)

    def of(self, drafter: Drafter) -> DrafterHistory:
        """What is known of one drafter."""
        history = self._drafters.get(drafter)
        if history is None:
            kind = self._kinds[_kind(drafter.name)]
            history = self._drafters[drafter] = DrafterHistory(drafter.name, kind)
        return history


def confidence_bin(name: str, confidence: float) -> int:
    """Column of a draft's confidence. name: its drafter's."""
    if _kind(name) == _HEADS:
        return bisect_right(_HEADS_EDGES, confidence)
    return min(int(confidence), BINS) - 1


def _kind(name: str) -> str:
    return name if name in _PRIORS else _HEADS
