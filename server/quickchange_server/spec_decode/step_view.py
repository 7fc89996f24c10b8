"""What speculation sees of the engine: its sequences, a step's plan, and what the step gave.

Protocols, so that speculation knows no scheduler and no runner; the engine's own classes fit them.
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
    """What Turbo heads expect after a sequence's first `after` tokens.

    chances: the heads' own probability of each, given those before it. matches: of those that a
    word of the prompt stands for, the characters that matched; 0: the head's own.
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
    key: bytes  # of its composition and salt
    drafting: Drafting | None
    matcher: Matcher | None  # where its text is constrained
    head_drafts: HeadDrafts | None  # made behind its last token, or behind an earlier one
    lookup: PromptLookup | None
    words: WordLookup | None

    @property
    def heads(self) -> str | None:
        """Digest of the adapter version whose Turbo heads draft for it."""
        ...

    @property
    def output_length(self) -> int: ...


class PlannedItem(Protocol):
    """Rows of one sequence in a step: its known tokens, then drafts to verify."""

    @property
    def sequence(self) -> DraftedSequence: ...

    @property
    def count(self) -> int:
        """Rows of known tokens."""
        ...

    @property
    def drafts(self) -> tuple[int, ...]: ...

    @property
    def heads(self) -> int | None:
        """Device slot of its Turbo heads."""
        ...

    @property
    def samples(self) -> bool:
        """Whether it yields a new token."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def sampled_rows(self) -> int: ...


class ItemResult(Protocol):
    """What an item that samples gave."""

    @property
    def sampled(self) -> Sequence[object]:
        """Row after row, down to the first draft that does not hold."""
        ...

    @property
    def drafts(self) -> tuple[tuple[int, float], ...]:
        """(token, chance) of what the heads expect after these."""
        ...


class StepResult(Protocol):
    """What a step gave, an item that samples after the other, and what it took in seconds."""

    @property
    def results(self) -> Sequence[ItemResult]: ...

    @property
    def seconds(self) -> float | None:
        """Of the forward pass and sampling; None where nobody waited for their end."""
        ...

    @property
    def draft_seconds(self) -> float | None:
        """Of the heads; None where none ran."""
        ...
