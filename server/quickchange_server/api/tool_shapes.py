"""The JSON of a chat whose answer may call tools."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from itertools import islice

from quickchange_server.api.shapes import ChatShape, Json
from quickchange_server.text import Text
from quickchange_server.tools import ToolCall, ToolReader
from quickchange_server.transcript import Ending, LoggedToken, Piece

_ID_LENGTH = 9  # letters and digits: what the strictest chat template takes
_ID_CHARACTERS = string.ascii_letters + string.digits


class ToolChatShape(ChatShape):
    """As a chat's, with the calls taken out of the text. A call is told whole, when it is."""

    def __init__(
        self, text: Text, logprobs: bool, reader: Callable[[], ToolReader], *, most: int | None
    ) -> None:
        """reader: makes one for each choice. most: calls of one choice that are told."""
        super().__init__(text, logprobs)
        self._reader = reader
        self._most = most
        self._streams: dict[int, _Stream] = {}

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        said, calls = self._stream(index).push(text, final=True)
        shown = super().choice(index, said, tokens, ending)
        if calls:
            shown["message"]["content"] = said.strip() or None
            shown["message"]["tool_calls"] = [_call(call) for _, call in calls]
            shown["finish_reason"] = _reason(ending)
        return shown

    def chunk(self, index: int, piece: Piece) -> Json:
        stream = self._stream(index)
        said, calls = stream.push(piece.text, final=piece.ending is not None)
        shown = super().chunk(index, Piece(said, piece.tokens, piece.ending))
        if calls:
            shown["delta"]["tool_calls"] = [{"index": n, **_call(call)} for n, call in calls]
        if stream.told:
            shown["finish_reason"] = _reason(piece.ending)
        return shown

    def _stream(self, index: int) -> _Stream:
        return self._streams.setdefault(index, _Stream(self._reader(), self._most))


class _Stream:
    """One choice's calls, numbered."""

    def __init__(self, reader: ToolReader, most: int | None) -> None:
        self._reader = reader
        self._most = most
        self.told = 0

    def push(self, text: str, *, final: bool) -> tuple[str, list[tuple[int, ToolCall]]]:
        said, calls = self._reader.push(text, final=final)
        left = None if self._most is None else self._most - self.told
        numbered = list(enumerate(islice(calls, left), start=self.told))
        self.told += len(numbered)
        return said, numbered


def _call(call: ToolCall) -> Json:
    call_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id, "type": "function", "function": function}


def _reason(ending: Ending | None) -> str | None:
    """A choice that was cut off says so, whatever it called."""
    return "tool_calls" if ending == "stop" else ending
