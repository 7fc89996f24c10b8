"""Words of the prompt among the heads' drafts, each before the next head reads it.

Heads see the model's state and the last token, not the prompt: in the middle of a name that the
output copies they can't know what follows, and after it they know very well. So at each depth the
likelier of both is drafted, and the heads go on from there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from quickchange_server.engine.acceptance import Acceptance, Drafter
from quickchange_server.engine.word_lookup import WordLookup


@dataclass(slots=True)
class GuidedChain:
    """One sequence's drafts as they come."""

    lookup: WordLookup | None  # None: the heads are left alone
    heads: Drafter
    words: Drafter
    depth: int  # tokens wanted
    path: list[int] = field(default_factory=list)  # the certain token, then the drafts
    matches: list[int] = field(default_factory=list)  # of each draft: characters; 0: the head's own

    def draft(self, token: int, chance: float, acceptance: Acceptance) -> int:
        """The next draft, where the head's is `token`, of probability `chance`."""
        depth = len(self.path)
        match = 0
        found = None
        if self.lookup is not None and depth <= self.depth:
            found = self.lookup.find(1, self.path)
        if found is not None and found.tokens[0] != token:
            own = acceptance.chance(self.heads, depth, chance)
            if acceptance.chance(self.words, depth, found.match) > own:
                token, match = found.tokens[0], found.match
        self.path.append(token)
        self.matches.append(match)
        return token


class WordGuide:
    """Says after each round of heads what is drafted. One call of the drafter long."""

    def __init__(self, chains: Seq[GuidedChain], acceptance: Acceptance) -> None:
        self._chains = chains
        self._acceptance = acceptance

    def begin(self, tokens: Seq[int]) -> None:
        """The certain next token of each chain."""
        for chain, token in zip(self._chains, tokens, strict=True):
            chain.path.append(token)

    def revise(self, tokens: Seq[int], chances: Seq[float]) -> list[int]:
        """The drafts of the next depth, from the heads' own."""
        return [
            chain.draft(token, chance, self._acceptance)
            for chain, token, chance in zip(self._chains, tokens, chances, strict=True)
        ]
