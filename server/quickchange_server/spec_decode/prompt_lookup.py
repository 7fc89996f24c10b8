"""Drafts from what followed the same tokens earlier in a sequence: prompt lookup.

After "Prompt Lookup Decoding" (Saxena, 2023). The index grows with the sequence, O(1) a token, and
what it finds is a function of the tokens alone: preemption and restarts change nothing but speed.
Knows nothing of models: token ids in, token ids out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 8  # tokens compared at most: a longer match says little more
WALKED = 64  # earlier places of the last two tokens looked at, latest first: bounds a step's time

_NOWHERE = -1  # ends a chain of places in the array that links them


class Found(NamedTuple):
    """What followed the same tokens before."""

    tokens: tuple[int, ...]  # drafts, at least one
    match: int  # tokens that agree before them, 1 to LONGEST


class PromptLookup:
    """The index of one sequence.

    `tokens` is the sequence's own list, which may only grow; what is new in it is taken up by each
    `find`. A place is the index of a token; it is known once a token follows it. Places of the same
    pair of tokens are linked, latest first: 4 bytes a token and an entry a distinct pair.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._last: dict[int, int] = {}  # token -> its latest known place
        self._last_pair: dict[int, int] = {}  # two tokens -> latest place of the second
        self._earlier = array("i")  # place -> the place before it of the same pair

    def find(self, most: int, after: Sequence[int] = ()) -> Found | None:
        """Up to `most` tokens to follow the sequence and, behind it, the drafts `after`.

        They follow the longest match of the last tokens in the sequence before (the latest of
        equals; of the WALKED latest places of the last two tokens). A continuation that reaches the
        end goes on into `after` and into itself, so that a period goes on as long as wanted.
        """
        self._take_up()
        if most < 1:
            return None
        suffix = [*self._tokens[-LONGEST:], *after][-LONGEST:]
        place, match = self._best_place(suffix)
        if not match:
            return None
        start = place + 1
        known = [*self._tokens[start : start + most], *after][:most]
        while len(known) < most:
            known += known[: most - len(known)]
        return Found(tuple(known), match)

    def _take_up(self) -> None:
        tokens, earlier = self._tokens, self._earlier
        for place in range(len(earlier), len(tokens) - 1):
            token = tokens[place]
            self._last[token] = place
            if place:
                pair = _pair(tokens[place - 1], token)
                earlier.append(self._last_pair.get(pair, _NOWHERE))
                self._last_pair[pair] = place
            else:
                earlier.append(_NOWHERE)

    def _best_place(self, suffix: list[int]) -> tuple[int, int]:
        """The place of the longest match and its length in tokens; length 0 where there is none."""
        if not suffix:
            return _NOWHERE, 0
        place = _NOWHERE
        if len(suffix) > 1:
            place = self._last_pair.get(_pair(suffix[-2], suffix[-1]), _NOWHERE)
        if place == _NOWHERE:
            place = self._last.get(suffix[-1], _NOWHERE)
            return place, int(place != _NOWHERE)
        best, longest = place, 0
        for _ in range(WALKED):
            match = self._agreeing(place, suffix)
            if match > longest:
                best, longest = place, match
            if match == len(suffix):
                break
            place = self._earlier[place]
            if place == _NOWHERE:
                break
        return best, longest

    def _agreeing(self, place: int, suffix: list[int]) -> int:
        """How many tokens up to `place` agree with the end of `suffix`, whose last two do."""
        tokens = self._tokens
        most = min(place + 1, len(suffix))
        match = 2
        while match < most and tokens[place - match] == suffix[-1 - match]:
            match += 1
        return match


def _pair(first: int, second: int) -> int:
    """One number for two token ids: smaller in memory than a tuple of both."""
    return first << 32 | second
