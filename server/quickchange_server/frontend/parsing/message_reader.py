"""One choice's text as parts of a message: text and tool calls, piece by piece as they come."""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_server.frontend.parsing.argument_reading import CallPiece as CallPiece
from quickchange_server.frontend.parsing.tool_parser import ToolReader


@dataclass(frozen=True, slots=True)
class MessagePiece:
    """What a message grows by."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


class MessageReader:
    """Incremental parser of one choice's text."""

    def __init__(self, tools: ToolReader | None = None, *, most_calls: int | None = None) -> None:
        """`most_calls`: calls after so many are dropped."""
        self._tools = tools
        self._most_calls = most_calls

    def push(self, text: str, *, final: bool) -> MessagePiece:
        """Add text, the last if `final`; what may still become a call is held back."""
        if self._tools is None:
            return MessagePiece(text)
        content, calls = self._tools.push(text, final=final)
        most = self._most_calls
        kept = tuple(call for call in calls if most is None or call.index < most)
        return MessagePiece(content, calls=kept)
