"""Speculation's view of the engine: its sequences, a step's plan and its results.

Protocols, which the engine's classes fit, so that speculation knows no scheduler and no runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quickchange_server.protocol import Drafting, Submit
from quickchange_server.spec_decode.prompt_lookup import PromptLookup, WordLookup
from quickchange_server.structured_output.compiler import Matcher


@dataclass(frozen=True, slots=True)
class HeadDrafts:
    """Drafts of Turbo heads after a sequence's first `after` tokens.

    chances: the heads' own probability of each, given those before it. matches: characters that
    matched, for drafts that a word of the prompt replaced; 0: the head's own.
    """

    after: int
    tokens: tuple[int, ...]
    chances: tuple[float, ...]
    matches: tuple[int, ...]


class DraftedSequence(Protocol):
    """A sequence that drafts may be made for."""

    request: Submit
    request_id: str
    tokens: list[int]  # prompt and output
    key: bytes  # key of its composition and salt
    drafting: Drafting | None
    matcher: Matcher | None  # if its text is constrained
    head_drafts: HeadDrafts | None  # behind its last token or an earlier one
    lookup: PromptLookup | None
    words: WordLookup | None

    @property
    def heads(self) -> str | None:
        """Digest of the adapter version whose Turbo heads draft for the sequence."""
        ...

    @property
    def output_length(self) -> int: ...

    @property
    def length(self) -> int:
        """Positions of its text so far, with virtual tokens in front."""
        ...


class PlannedItem(Protocol):
    """Rows of one sequence in a step: its known tokens, then drafts to verify."""

    @property
    def sequence(self) -> DraftedSequence: ...

    @property
    def count(self) -> int:
        """Number of rows of known tokens."""
        ...

    @property
    def drafts(self) -> tuple[int, ...]: ...

    @property
    def heads(self) -> int | None:
        """Device slot of the sequence's Turbo heads."""
        ...

    @property
    def samples(self) -> bool:
        """True if the item yields a new token."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def sampled_rows(self) -> int: ...


class ItemResult(Protocol):
    """Results of one sampling item."""

    @property
    def sampled(self) -> Sequence[object]:
        """Sampled tokens by row, down to the first rejected draft's."""
        ...

    @property
    def drafts(self) -> tuple[tuple[int, float], ...]:
        """(token, probability) of the heads' drafts after these."""
        ...


class StepResult(Protocol):
    """Results of a step's sampling items in order, and its durations in seconds."""

    @property
    def results(self) -> Sequence[ItemResult]: ...

    @property
    def seconds(self) -> float | None:
        """Duration of the forward pass and sampling; None if nobody waited for their end."""
        ...

    @property
    def draft_seconds(self) -> float | None:
        """Duration of the heads; None if none ran."""
        ...
