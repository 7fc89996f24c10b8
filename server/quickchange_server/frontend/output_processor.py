"""Processing of the engine's tokens into text: detokenizing, stop strings, log-probabilities.

One transcript per choice. Knows nothing of HTTP; `api/` turns its pieces into JSON.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Literal

from quickchange_server.frontend.parsing.stop_strings import StopScanner
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Delta, SamplingParams, TokenLogprobs

Ending = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token with its log-probabilities and its place in the text."""

    offset: int  # characters of the choice's text before it
    logprobs: TokenLogprobs
    text: str  # the text that it completes; "" in the middle of a character
    drafted: bool  # True if it came from an accepted draft


@dataclass(frozen=True, slots=True)
class Piece:
    """What a choice grows by. The last piece has an `ending`."""

    text: str
    tokens: tuple[LoggedToken, ...] = ()
    ending: Ending | None = None
    ids: tuple[int, ...] = ()  # of all tokens since the piece before, that of the end included
    # With the ending: the stop string or token; None: an end of sequence, or the limit.
    stop_reason: str | int | None = None


class Transcript:
    """The growing text of one choice.

    The text excludes the stop string or stop token that ended it, unless
    `include_stop_str_in_output`. Log-probabilities come with their text; tokens behind a stop
    string are dropped with theirs.
    """

    def __init__(
        self, text: Text, sampling: SamplingParams, shown: frozenset[int] = frozenset()
    ) -> None:
        """`shown`: special tokens that are text in any case."""
        self._sampling = sampling
        self._ends = frozenset[int]() if sampling.ignore_eos else text.eos_ids
        self._detokenizer = text.detokenizer(
            skip_special_tokens=sampling.skip_special_tokens, shown=shown
        )
        self._scanner = StopScanner(sampling.stop, include=sampling.include_stop_str_in_output)
        self._waiting: deque[LoggedToken] = deque()  # tokens whose text is not emitted yet
        self._decoded = 0  # characters
        self._begins = array("I")  # where each token's text begins
        self._emitted = 0  # characters
        self._untold: list[int] = []  # token ids that no piece has had
        self.stopped_by: str | None = None  # the stop string that ended the text
        self.completion_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0  # completion tokens that came from accepted drafts

    def push(self, delta: Delta) -> Piece:
        """Add a delta's tokens. A piece with an ending completes the choice."""
        parts: list[str] = []
        stopped = False
        self.completion_tokens += len(delta.token_ids)
        before = self.completion_tokens - len(delta.token_ids)
        for index, token_id in enumerate(self._visible(delta)):
            logged = delta.logprobs[index] if delta.logprobs else None
            drafted = index < delta.accepted
            text, stopped = self._add(token_id, logged, before + index + 1, drafted)
            parts.append(text)
            if stopped:
                self.completion_tokens = before + index + 1
                break
        self._untold += delta.token_ids[: self.completion_tokens - before]
        self.drafted_tokens += delta.drafted
        # A delta's accepted drafts are its first tokens; a stop string may have cut some off.
        self.accepted_tokens += min(delta.accepted, self.completion_tokens - before)
        if delta.finish_reason is not None and not stopped:
            text, stopped = self._finish()
            parts.append(text)
        return self._piece("".join(parts), delta, stopped)

    def tokens_within(self, start: int, stop: int) -> int:
        """Tokens whose text begins in this part of the choice's text."""
        return bisect_left(self._begins, stop) - bisect_left(self._begins, start)

    def _visible(self, delta: Delta) -> tuple[int, ...]:
        """The delta's tokens without the stop token that ended the choice."""
        ids = delta.token_ids
        ended_by_token = (
            delta.finish_reason == "stop" and ids and ids[-1] in self._sampling.stop_token_ids
        )
        return ids[:-1] if ended_by_token and not self._sampling.include_stop_str_in_output else ids

    def _add(
        self, token_id: int, logprobs: TokenLogprobs | None, position: int, drafted: bool
    ) -> tuple[str, bool]:
        """Add the `position`-th token (from 1). Returns certain text, true if a stop completed."""
        text = self._detokenizer.push(token_id)
        self._begins.append(self._decoded)
        if logprobs is not None:
            self._waiting.append(LoggedToken(self._decoded, logprobs, text, drafted))
        self._decoded += len(text)
        if position <= self._sampling.min_tokens:
            return text, False
        return self._scan(text)

    def _scan(self, text: str) -> tuple[str, bool]:
        scanned = self._scanner.push(text)
        self.stopped_by = scanned.stop
        return scanned.text, scanned.stop is not None

    def _finish(self) -> tuple[str, bool]:
        text, stopped = self._scan(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._scanner.finish(), False)

    def _piece(self, text: str, delta: Delta, stopped: bool) -> Piece:
        self._emitted += len(text)
        everything = delta.finish_reason is not None and not stopped
        tokens = self._released(everything) if self._waiting else ()
        reason = "stop" if stopped else delta.finish_reason
        ending: Ending | None = reason if reason in ("stop", "length") else None
        if not (text or tokens or ending):
            return Piece("")
        ids, self._untold = tuple(self._untold), []
        return Piece(text, tokens, ending, ids, self._stop_reason(ending, ids))

    def _stop_reason(self, ending: Ending | None, ids: tuple[int, ...]) -> str | int | None:
        if self.stopped_by is not None or ending != "stop" or not ids:
            return self.stopped_by
        stops = self._sampling.stop_token_ids
        return ids[-1] if ids[-1] in stops and ids[-1] not in self._ends else None

    def _released(self, everything: bool) -> tuple[LoggedToken, ...]:
        released = []
        while self._waiting and (everything or self._waiting[0].offset < self._emitted):
            released.append(self._waiting.popleft())
        return tuple(released)
