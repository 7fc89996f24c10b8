"""Stop strings in a stream of text, which ends before (or after) the first that completes.

Text that may begin a stop string is held back until it is certain. The result does not depend on
how the text was cut into pieces. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scanned:
    """Result of scanning a piece: text to emit, and the stop string that completed, if any."""

    text: str
    stop: str | None = None


class _Pattern:
    """One stop string, matched a character at a time (Knuth, Morris and Pratt 1977)."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # length of its longest prefix that ends the text so far
        self._fallback = _fallbacks(text)

    def advance(self, character: str) -> bool:
        """Take one character; true if it completes the stop string."""
        matched = self.matched
        while matched and self.text[matched] != character:
            matched = self._fallback[matched - 1]
        self.matched = matched + 1 if self.text[matched] == character else 0
        return self.matched == len(self.text)


def _fallbacks(text: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = table[length - 1]
        length += text[index] == text[length]
        table[index] = length
    return table


class StopScanner:
    """Finds the first stop string to complete; of several that complete together, the longest."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._patterns = [_Pattern(text) for text in dict.fromkeys(stops)]
        self._include = include
        self._held = ""

    def push(self, piece: str) -> Scanned:
        """Scan a piece. After a stop string has completed, push nothing more."""
        if not self._patterns:
            return Scanned(piece)
        for index, character in enumerate(piece):
            complete = [pattern for pattern in self._patterns if pattern.advance(character)]
            if complete:
                stop = max((pattern.text for pattern in complete), key=len)
                return self._ended(self._held + piece[: index + 1], stop)
        return self._certain(self._held + piece)

    def finish(self) -> str:
        """The text held back, for a stream that ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _ended(self, text: str, stop: str) -> Scanned:
        self._held = ""
        return Scanned(text if self._include else text[: len(text) - len(stop)], stop)

    def _certain(self, text: str) -> Scanned:
        certain = len(text) - max(pattern.matched for pattern in self._patterns)
        self._held = text[certain:]
        return Scanned(text[:certain])
