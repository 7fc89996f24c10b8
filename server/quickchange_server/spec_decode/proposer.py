"""Proposer of drafts: the most promising chain for one sequence, from all that may draft for it.

Drafts come from an adapter's Turbo heads, which the step before has run; from prompt lookup, by
tokens and by words; and from a constraint, if it leaves only one text to go on with. A chain is the
best of one of them, or of one after the other. Knows nothing of the cost of drafts, nor of other
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from quickchange_server.protocol import LOOKUP
from quickchange_server.spec_decode.acceptance_rates import (
    DEEPEST,
    FORCED,
    WORDS,
    Acceptance,
    Drafter,
)
from quickchange_server.spec_decode.draft_selection import expected_tokens
from quickchange_server.spec_decode.prompt_lookup import (
    LookupMatch,
    PromptLookup,
    TokenText,
    WordLookup,
)
from quickchange_server.spec_decode.step_view import DraftedSequence
from quickchange_server.structured_output.compiler import Matcher

_UNSURE = 0.5  # chance of a head's draft below which lookup may take over in mid-chain


class Draft(NamedTuple):
    """One token to verify."""

    token: int
    drafter: Drafter
    confidence: float  # see `Acceptance.chance`
    chance: float  # acceptance rate, given that all before it are accepted


class Proposer:
    """Offers the chains of a step. text: None: prompts are looked up by tokens alone.

    `alone` keeps the chances of the prompts' own drafts, for the planning of heads.
    """

    def __init__(self, acceptance: Acceptance, max_model_len: int, text: TokenText | None) -> None:
        self._acceptance = acceptance
        self._max_model_len = max_model_len
        self._text = text
        self.alone: dict[str, list[float]] = {}  # by request: chances of drafts without heads

    def most(self, sequence: DraftedSequence) -> int:
        """Number of drafts that can still count: the last token of a sequence needs none."""
        left = sequence.request.sampling.token_limit - sequence.output_length
        return min(left, self._max_model_len - sequence.length, DEEPEST + 1) - 1

    def chain(self, sequence: DraftedSequence) -> list[Draft]:
        """The drafts offered for a sequence; empty if it has none."""
        most = self.most(sequence)
        if most < 1 or sequence.drafting is None:
            return []
        heads = self._of_heads(sequence, most)
        offered = self._with_lookup(sequence, heads, most) if sequence.drafting.lookup else heads
        if sequence.matcher is None:
            return offered
        forced = self._of_constraint(sequence, sequence.matcher, most)
        return max(_lawful(sequence.matcher, offered), forced, key=_expected)

    def words(self, sequence: DraftedSequence) -> WordLookup | None:
        """The sequence's lookup by words; None if there is no tokenizer."""
        if sequence.words is None and self._text is not None:
            sequence.words = WordLookup(sequence.tokens, len(sequence.request.prompt), self._text)
        return sequence.words

    def _with_lookup(self, sequence: DraftedSequence, heads: list[Draft], most: int) -> list[Draft]:
        """The best chain of the prompt's drafts, alone or behind some of the heads'."""
        if not heads:
            alone = self._of_prompt(sequence, (), most)
            self.alone[sequence.request_id] = [draft.chance for draft in alone]
            return alone
        # Lookup goes on where the heads end, or where they are least sure.
        weakest = min(range(len(heads)), key=lambda i: heads[i].chance)
        cuts = {len(heads), weakest if heads[weakest].chance < _UNSURE else len(heads)}
        joined = [
            [*heads[:cut], *self._of_prompt(sequence, heads[:cut], most - cut)] for cut in cuts
        ]
        return max([heads, *joined], key=_expected)

    def _of_heads(self, sequence: DraftedSequence, most: int) -> list[Draft]:
        made, heads = sequence.head_drafts, heads_of(sequence)
        if made is None or heads is None or made.after != len(sequence.tokens):
            return []
        words = Drafter(WORDS, sequence.key)
        drafts = []
        for depth, token in enumerate(made.tokens, 1):
            match = made.matches[depth - 1]
            drafter, confidence = (words, match) if match else (heads, made.chances[depth - 1])
            chance = self._acceptance.chance(drafter, depth, confidence)
            drafts.append(Draft(token, drafter, confidence, chance))
        sure = [d.confidence if d.drafter is heads else d.chance for d in drafts]
        self._acceptance.offered(heads, sure)
        return drafts[:most]

    def _of_constraint(self, sequence: DraftedSequence, matcher: Matcher, most: int) -> list[Draft]:
        drafter = Drafter(FORCED, sequence.key)
        return [
            Draft(token, drafter, 1, self._acceptance.chance(drafter, depth, 1))
            for depth, token in enumerate(matcher.forced()[:most], 1)
        ]

    def _of_prompt(self, sequence: DraftedSequence, after: Seq[Draft], most: int) -> list[Draft]:
        """The prompt's best drafts behind the drafts `after`, by tokens or by words."""
        tokens = [draft.token for draft in after]
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(sequence.tokens)
        by_tokens = sequence.lookup.find(most, tokens)
        chains = [self._found(by_tokens, Drafter(LOOKUP, sequence.key), len(after))]
        words = self.words(sequence)
        if words is not None:
            found = words.find(most, tokens)
            chains.append(self._found(found, Drafter(WORDS, sequence.key), len(after)))
        return max(chains, key=_expected)

    def _found(self, found: LookupMatch | None, drafter: Drafter, before: int) -> list[Draft]:
        """Drafts of a lookup, behind `before` other drafts."""
        if found is None:
            return []
        drafts = []
        for place, token in enumerate(found.tokens):
            match = found.match + place
            chance = self._acceptance.chance(drafter, before + place + 1, match)
            drafts.append(Draft(token, drafter, match, chance))
        return drafts


def heads_of(sequence: DraftedSequence) -> Drafter | None:
    """The Turbo heads that draft for a sequence."""
    return None if sequence.heads is None else Drafter(sequence.heads, sequence.key)


def _lawful(matcher: Matcher, chain: list[Draft]) -> list[Draft]:
    """The chain down to the first draft that a constraint forbids."""
    return chain and chain[: matcher.allowed([draft.token for draft in chain])]


def _expected(chain: Seq[Draft]) -> float:
    """Expected tokens of a chain, if all of it is verified."""
    return expected_tokens([draft.chance for draft in chain])
