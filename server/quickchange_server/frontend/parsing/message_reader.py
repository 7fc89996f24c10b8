"""One choice's text as parts of a message: text and tool calls, piece by piece as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quickchange_server.frontend.parsing.argument_reading import CallPiece as CallPiece
from quickchange_server.frontend.parsing.reasoning_parser import ReasoningReader
from quickchange_server.frontend.parsing.tool_parser import ToolReader


@dataclass(frozen=True, slots=True)
class MessagePiece:
    """What a message grows by."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()

    @property
    def continued(self) -> tuple[CallPiece, ...]:
        """What grows a call that was begun before: it comes before the content."""
        return tuple(call for call in self.calls if call.name is None)

    @property
    def begun(self) -> tuple[CallPiece, ...]:
        """The calls that begin with this piece, behind the content."""
        return tuple(call for call in self.calls if call.name is not None)


class MessageReader:
    """Incremental parser of one choice's text."""

    def __init__(
        self,
        tools: ToolReader | None = None,
        *,
        most_calls: int | None = None,
        thoughts: ReasoningReader | None = None,
    ) -> None:
        """`most_calls`: calls after so many are dropped."""
        self._thoughts = thoughts
        self._tools = tools
        self._most_calls = most_calls

    def push(self, text: str, *, final: bool) -> MessagePiece:
        """Add text, the last if `final`; what may still become a call is held back."""
        reasoning = ""
        if self._thoughts is not None:
            reasoning, text = self._thoughts.push(text, final=final)
        if self._tools is None:
            return MessagePiece(text, reasoning)
        content, calls = self._tools.push(text, final=final)
        most = self._most_calls
        kept = tuple(call for call in calls if most is None or call.index < most)
        return MessagePiece(content, reasoning, kept)

    @property
    def reasoning_spans(self) -> Sequence[tuple[int, int]]:
        """Where thoughts stand in the choice's text so far, in characters: from, to."""
        return () if self._thoughts is None else self._thoughts.spans
