"""Proposer of drafts: the most promising chain for one sequence, from all that may draft for it.

Drafts come from an adapter's Turbo heads, which the step before has run; from prompt lookup, by
tokens and by words; and from a constraint, if it leaves only one text to go on with. A chain is the
best of one of them, or of one after the other. Knows nothing of the cost of drafts, nor of other
sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import count, islice, repeat
from math import prod
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
_FAINT = 0.02  # chance that a draft is reached under which nothing is worth looking for


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
        return max(_lawful(sequence.matcher, offered), forced.drafts(), key=_expected)

    def words(self, sequence: DraftedSequence) -> WordLookup | None:
        """The sequence's lookup by words; None if there is no tokenizer."""
        if sequence.words is None and self._text is not None:
            sequence.words = WordLookup(sequence.tokens, len(sequence.request.prompt), self._text)
        return sequence.words

    def _with_lookup(self, sequence: DraftedSequence, heads: list[Draft], most: int) -> list[Draft]:
        """The best chain of the prompt's drafts, alone or behind some of the heads'."""
        if not heads:
            alone = self._of_prompt(sequence, (), most)
            self.alone[sequence.request_id] = alone.chances
            return alone.drafts()
        tokens = [draft.token for draft in heads]
        chances = [draft.chance for draft in heads]
        # Lookup goes on where the heads end, or where they are least sure.
        weakest = min(range(len(heads)), key=chances.__getitem__)
        cuts = [weakest] if chances[weakest] < _UNSURE else []
        best, joined = expected_tokens(chances), heads
        for cut in (*cuts, len(heads)):
            path = prod(chances[:cut])
            if path < _FAINT:
                break
            run = self._of_prompt(sequence, tokens[:cut], most - cut)
            expected = expected_tokens([*chances[:cut], *run.chances])
            if expected > best:
                best, joined = expected, [*heads[:cut], *run.drafts()]
        return joined

    def _of_heads(self, sequence: DraftedSequence, most: int) -> list[Draft]:
        made, heads = sequence.head_drafts, heads_of(sequence)
        if made is None or heads is None or made.after != len(sequence.tokens):
            return []
        end = _end(sequence, made.tokens)
        sure: Seq[float] = made.chances[:end]
        if not any(made.matches):
            self._acceptance.offered(heads, sure, ends=end < len(made.tokens))
            return self._run(heads, made.tokens[: min(end, most)], sure).drafts()
        words = Drafter(WORDS, sequence.key)
        drafts = []
        for at, match in enumerate(made.matches[:end]):
            drafter, confidence = (words, match) if match else (heads, sure[at])
            chance = self._acceptance.chance(drafter, at + 1, confidence)
            drafts.append(Draft(made.tokens[at], drafter, confidence, chance))
        sure = [d.confidence if d.drafter is heads else d.chance for d in drafts]
        self._acceptance.offered(heads, sure, ends=end < len(made.tokens))
        return drafts[:most]

    def _of_constraint(self, sequence: DraftedSequence, matcher: Matcher, most: int) -> _Run:
        return self._run(Drafter(FORCED, sequence.key), matcher.forced()[:most], repeat(1))

    def _of_prompt(self, sequence: DraftedSequence, after: Seq[int], most: int) -> _Run:
        """The prompt's best drafts behind the drafts `after`, by tokens or by words."""
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(sequence.tokens)
        found = self._found(sequence, LOOKUP, sequence.lookup.find(most, after), len(after))
        words = self.words(sequence)
        by_words = None if words is None else words.find(most, after)
        if by_words is None:
            return found
        other = self._found(sequence, WORDS, by_words, len(after))
        return max(found, other, key=_Run.expected)

    def _found(
        self, sequence: DraftedSequence, name: str, found: LookupMatch | None, before: int
    ) -> _Run:
        """Drafts of a lookup, behind `before` other drafts. name: its drafter's."""
        drafter = Drafter(name, sequence.key)
        if found is None:
            return _Run(drafter, (), [], [])
        tokens = found.tokens[: _end(sequence, found.tokens)]
        return self._run(drafter, tokens, count(found.match), before)

    def _run(
        self, drafter: Drafter, tokens: Seq[int], sure: Iterable[float], before: int = 0
    ) -> _Run:
        """Drafts of one drafter in a row, behind `before` others, down to the first that will
        hardly be reached. sure: confidences."""
        confidences, chances = [], []
        path, chance_of = 1.0, self._acceptance.of(drafter).chance
        for depth, confidence in enumerate(islice(sure, len(tokens)), before + 1):
            chance = chance_of(depth, confidence)
            confidences.append(confidence)
            chances.append(chance)
            path *= chance
            if path < _FAINT:
                break
        return _Run(drafter, tokens, confidences, chances)


class _Run(NamedTuple):
    """Drafts of one drafter in a row."""

    drafter: Drafter
    tokens: Seq[int]  # of which there are chances for the first ones
    confidences: list[float]
    chances: list[float]

    def expected(self) -> float:
        return expected_tokens(self.chances)

    def drafts(self) -> list[Draft]:
        return list(map(Draft, self.tokens, repeat(self.drafter), self.confidences, self.chances))


def _end(sequence: DraftedSequence, tokens: Seq[int]) -> int:
    """Drafts before the first that would end the text: the row before it gives it as well."""
    stops = sequence.request.sampling.stop_token_ids
    return next((at for at, token in enumerate(tokens) if token in stops), len(tokens))


def heads_of(sequence: DraftedSequence) -> Drafter | None:
    """The Turbo heads that draft for a sequence."""
    return None if sequence.heads is None else Drafter(sequence.heads, sequence.key)


def _lawful(matcher: Matcher, chain: list[Draft]) -> list[Draft]:
    """The chain down to the first draft that a constraint forbids."""
    return chain and chain[: matcher.allowed([draft.token for draft in chain])]


def _expected(chain: Seq[Draft]) -> float:
    """Expected tokens of a chain, if all of it is verified."""
    return expected_tokens([draft.chance for draft in chain])
