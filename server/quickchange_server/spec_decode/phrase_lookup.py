"""Drafts from words of the prompt that the output is in the middle of: lookup by text, not tokens.

A word that an output copies is often in other tokens than in its prompt: behind a quote `Krakow` is
`K` `rak` `ow`, behind a space it is ` Kr` `ak` `ow`, so that lookup by tokens finds nothing. Here
the last words of the output are looked for in the prompt's text, and what follows them there is put
into the tokens that it has behind them. A function of the tokens alone. Knows no tokenizer: it is
given one as two functions.

Words of the prompt among the heads' drafts, each before the next head reads it.

Heads see the model's state and the last token, not the prompt: in the middle of a name that the
output copies they can't know what follows, and after it they know very well. So at each depth the
likelier of both is drafted, and the heads go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from quickchange_server.spec_decode.acceptance_rates import Acceptance, Drafter
from quickchange_server.spec_decode.prompt_lookup import Found

_TAIL = 12  # tokens of the output looked back at
_AHEAD = 48  # characters taken from the prompt at most
_JOINTS = " -"  # within a phrase: one of them between two words


@dataclass(frozen=True)
class TokenText:
    """A tokenizer's two directions."""

    piece: Callable[[int], str]  # one token's own text, its leading space included
    encode: Callable[[str], Sequence[int]]  # text to tokens, without special ones


class WordLookup:
    """Of one sequence. `tokens` is the sequence's own list, prompt first, which may only grow."""

    def __init__(self, tokens: list[int], prompt_length: int, text: TokenText) -> None:
        self._tokens = tokens
        self._prompt_length = prompt_length
        self._text = text
        self._prompt = "".join(text.piece(token) for token in tokens[:prompt_length])

    def find(self, most: int, after: Sequence[int] = ()) -> Found | None:
        """Up to `most` tokens to follow the output and, behind it, the drafts `after`.

        They finish the phrase of the prompt, the latest one, that the longest run of last words
        begins; None where there is no such phrase, or where it ends there. `Found.match` is in
        characters.
        """
        tail = self._words(after)
        if most < 1 or not tail:
            return None
        pieces = [self._text.piece(token) for token in tail]
        for start, piece in enumerate(pieces):
            if start and not piece.startswith(" "):
                continue  # a phrase begins with a word
            said = "".join(pieces[start:])
            place = self._latest(said.lstrip(" "))
            if place is None:
                continue
            tokens = self._text.encode(said + self._rest(place))
            known = len(tail) - start
            if list(tokens[:known]) != tail[start:] or len(tokens) == known:
                return None  # it ends here, or goes on in tokens that do not begin like these
            return Found(tuple(tokens[known : known + most]), len(said.lstrip(" ")))
        return None

    def _words(self, after: Sequence[int]) -> list[int]:
        """The last tokens of output and `after` that are words or parts of words."""
        tokens = [*self._tokens[max(self._prompt_length, len(self._tokens) - _TAIL) :], *after]
        begin = len(tokens)
        while begin and _is_word(self._text.piece(tokens[begin - 1])):
            begin -= 1
        return tokens[max(begin, len(tokens) - _TAIL) :]

    def _latest(self, words: str) -> int | None:
        """Where, in the prompt, the latest phrase that begins with `words` goes on behind them."""
        place = self._prompt.rfind(words)
        while place > 0 and self._prompt[place - 1].isalnum():
            place = self._prompt.rfind(words, 0, place + len(words) - 1)
        return None if place < 0 else place + len(words)

    def _rest(self, place: int) -> str:
        """The phrase's end: letters, digits and single joints, whole words where it is long."""
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
    """Letters and digits, behind one joint at most."""
    return piece.lstrip(_JOINTS[0]).isalnum() or (piece[:1] in _JOINTS and piece[1:].isalnum())


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
