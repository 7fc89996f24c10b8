"""Prompt lookup: drafts that repeat what stands earlier in the sequence.

`PromptLookup` continues the longest match of the last tokens ("Prompt Lookup Decoding", Saxena,
2023). `WordLookup` finishes a phrase of the prompt by its text, also where the output spells it in
other tokens than the prompt; `WordGuide` puts such words in the place of single heads' drafts. What
is found is a function of the tokens alone: preemption and restarts change nothing but speed. Knows
nothing of models.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

from quickchange_server.spec_decode.acceptance_rates import Acceptance, Drafter

LONGEST = 8  # most tokens compared: a longer match says little more
WALKED = 64  # earlier places of the last two tokens looked at, latest first: bounds a step's time

_NOWHERE = -1  # ends a chain of places in the array that links them

_TAIL = 12  # last tokens of the output whose words are looked up
_AHEAD = 48  # most characters taken from the prompt
_JOINTS = " -"  # within a phrase: one of them between two words


class LookupMatch(NamedTuple):
    """Tokens that followed the same tokens, or words, before."""

    tokens: tuple[int, ...]  # drafts, at least one
    match: int  # tokens that agree before them, 1 to LONGEST; by words: characters


class PromptLookup:
    """Lookup by tokens in one sequence, with an index that grows in O(1) a token.

    `tokens` is the sequence's own list, which may only grow; each `find` indexes what is new in it.
    A place is the index of a token; it is known once a token follows it. Places of the same pair of
    tokens are linked, latest first: 4 bytes per token and an entry per distinct pair.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._last: dict[int, int] = {}  # token -> its latest known place
        self._last_pair: dict[int, int] = {}  # two tokens -> latest place of the second
        self._earlier = array("i")  # place -> the place before it of the same pair

    def find(self, most: int, after: Sequence[int] = ()) -> LookupMatch | None:
        """Up to `most` tokens to follow the sequence and, behind it, the drafts `after`.

        They follow the longest earlier match of the last tokens (the latest of equals, among the
        WALKED latest places of the last two tokens). A continuation that reaches the end goes on
        into `after` and into itself, so that a period is repeated as long as wanted. None if the
        last token does not occur before.
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
        return LookupMatch(tuple(known), match)

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
        """Place of the longest match and its length in tokens; length 0 if there is none."""
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
        """Number of tokens up to `place` that agree with the end of `suffix`, whose last two do."""
        tokens = self._tokens
        most = min(place + 1, len(suffix))
        match = 2
        while match < most and tokens[place - match] == suffix[-1 - match]:
            match += 1
        return match


def _pair(first: int, second: int) -> int:
    """One number for two token ids: smaller in memory than a tuple of both."""
    return first << 32 | second


@dataclass(frozen=True)
class TokenText:
    """A tokenizer: token to text, text to tokens."""

    piece: Callable[[int], str]  # one token's own text, its leading space included
    encode: Callable[[str], Sequence[int]]  # text to tokens, without special ones
    _words: dict[int, str] = field(default_factory=dict, init=False)

    def word(self, token: int) -> str:
        """Text of a token that is a word or a part of one, else nothing."""
        word = self._words.get(token)
        if word is None:
            piece = self.piece(token)
            word = self._words[token] = piece if _is_word(piece) else ""
        return word


class WordLookup:
    """Lookup by words in one prompt. tokens: the sequence's own list, which may only grow."""

    def __init__(self, tokens: list[int], prompt_length: int, text: TokenText) -> None:
        self._tokens = tokens
        self._prompt_length = prompt_length
        self._text = text
        self._prompt = "".join(text.piece(token) for token in tokens[:prompt_length])

    def find(self, most: int, after: Sequence[int] = ()) -> LookupMatch | None:
        """Up to `most` tokens to follow the output and, behind it, the drafts `after`.

        They finish the latest phrase of the prompt that begins with the longest run of last words;
        None if there is no such phrase, or if it ends there. `LookupMatch.match` counts characters.
        """
        if most < 1 or (after and not self._text.word(after[-1])):
            return None
        tail, pieces = self._words(after)
        for start, piece in enumerate(pieces):
            if start and not piece.startswith(" "):
                continue  # a phrase begins with a word
            written = "".join(pieces[start:])
            place = self._latest(written.lstrip(" "))
            if place is None:
                continue
            tokens = self._text.encode(written + self._rest(place))
            known = len(tail) - start
            if list(tokens[:known]) != tail[start:] or len(tokens) == known:
                return None  # it ends here, or its tokens do not begin like these
            return LookupMatch(tuple(tokens[known : known + most]), len(written.lstrip(" ")))
        return None

    def _words(self, after: Sequence[int]) -> tuple[list[int], list[str]]:
        """Last tokens of the output and `after` that are (parts of) words, and their text."""
        tail: list[int] = []
        pieces: list[str] = []
        output = self._tokens[max(self._prompt_length, len(self._tokens) - _TAIL) :]
        for token in islice(chain(reversed(after), reversed(output)), _TAIL):
            piece = self._text.word(token)
            if not piece:
                break
            tail.append(token)
            pieces.append(piece)
        return tail[::-1], pieces[::-1]

    def _latest(self, words: str) -> int | None:
        """Index in the prompt behind the latest phrase begin `words`; None if there is none."""
        place = self._prompt.rfind(words)
        while place > 0 and self._prompt[place - 1].isalnum():
            place = self._prompt.rfind(words, 0, place + len(words) - 1)
        return None if place < 0 else place + len(words)

    def _rest(self, place: int) -> str:
        """Rest of a phrase: letters, digits and single joints; whole words if it is long."""
        text = self._prompt[place : place + _AHEAD + 1]
        end = 0
        while end < len(text) and (text[end].isalnum() or self._joins(text, end)):
            end += 1
        if end <= _AHEAD:
            return text[:end]
        cut = max(text.rfind(joint) for joint in _JOINTS)
        return text[: max(cut, 0)]

    def _joins(self, text: str, place: int) -> bool:
        return text[place] in _JOINTS and text[place + 1 : place + 2].isalnum()


def _is_word(piece: str) -> bool:
    """True for letters and digits, behind spaces or one other joint."""
    return piece.lstrip(_JOINTS[0]).isalnum() or (piece[:1] in _JOINTS and piece[1:].isalnum())


@dataclass(slots=True)
class GuidedChain:
    """Drafts of one sequence, made depth by depth from its heads and its prompt's words."""

    lookup: WordLookup | None  # None: the heads' drafts stay
    heads: Drafter
    words: Drafter
    depth: int  # drafts wanted
    verified: tuple[int, ...] = ()  # drafts of the step, of which the accepted precede
    # Tokens behind the sequence's own: the accepted, the certain one, then the drafts.
    path: list[int] = field(default_factory=list)
    matches: list[int] = field(
        default_factory=list
    )  # characters that matched for each draft; 0: the head's own

    def begin(self, token: int, accepted: int) -> None:
        """Take the certain next token, behind so many accepted drafts."""
        self.path = [*self.verified[:accepted], token]

    def draft(self, token: int, chance: float, acceptance: Acceptance) -> int:
        """Choose the next draft; the head's is `token`, of probability `chance`."""
        depth = len(self.matches) + 1
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
    """Revises heads' drafts by the prompt's words, during one drafting call."""

    def __init__(self, chains: Sequence[GuidedChain], acceptance: Acceptance) -> None:
        self._chains = chains
        self._acceptance = acceptance

    def begin(self, tokens: Sequence[int], accepted: Sequence[int]) -> None:
        """Take the certain next token of each chain, and its number of accepted drafts."""
        for own, token, held in zip(self._chains, tokens, accepted, strict=True):
            own.begin(token, held)

    def revise(self, tokens: Sequence[int], chances: Sequence[float]) -> list[int]:
        """Drafts of the next depth, given the heads' own."""
        return [
            own.draft(token, chance, self._acceptance)
            for own, token, chance in zip(self._chains, tokens, chances, strict=True)
        ]
