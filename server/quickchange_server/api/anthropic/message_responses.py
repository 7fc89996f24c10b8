"""JSON of the answers to messages: blocks of content, piece by piece or as a whole.

The whole answer is what its events add up to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_responses import call_id
from quickchange_server.api.openai.chat.chat_route import Chat
from quickchange_server.frontend.output_processor import Ending
from quickchange_server.frontend.parsing.message_reader import CallPiece, MessagePiece
from quickchange_server.frontend.request_base import Json

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
Kind = Literal["text", "thinking", "tool_use"]


class MessageWriter:
    """The blocks of one message, as they grow."""

    def __init__(self, *, show_thinking: bool = True) -> None:
        """Without `show_thinking` the text of reasoning is left out of its blocks."""
        self._show_thinking = show_thinking
        self.content: list[Json] = []  # the blocks; the last may be open
        self._open: Kind | None = None
        # White space that no text has followed yet: it is no block, and ends none but the last.
        self._blank = ""
        self._thought = ""  # all of the open block's reasoning
        self._input = ""  # the last call's, as JSON

    @property
    def called(self) -> bool:
        return any(block["type"] == "tool_use" for block in self.content)

    @property
    def whole_call(self) -> bool:
        """True if the last call's input is complete."""
        return self.called and _is_object(self._input)

    def push(self, piece: MessagePiece) -> Iterator[Json]:
        """The events of what the message grows by."""
        if piece.reasoning:
            yield from self._think(piece.reasoning)
        for call in piece.continued:
            yield from self._call(call)
        if piece.content:
            yield from self._say(piece.content)
        for call in piece.begun:
            yield from self._call(call)

    def finish(self) -> Iterator[Json]:
        """The events of the end. A message without content gets a block of text, as there are
        clients that look for one."""
        if not self.content:
            blank = self._blank
            yield from self._begin("text", {"type": "text", "text": ""})
            self._blank = blank
        if self._open == "text" and self._blank:
            yield self._add(self._blank)
        yield from self._close()

    def _think(self, text: str) -> Iterator[Json]:
        if self._open != "thinking":
            block = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._begin("thinking", block)
            self._thought = ""
        self._thought += text
        if self._show_thinking:
            self.content[-1]["thinking"] += text
            yield self._delta(type="thinking_delta", thinking=text)

    def _say(self, text: str) -> Iterator[Json]:
        written = self._blank + text
        text = written.rstrip()
        if text:
            if self._open != "text":
                yield from self._begin("text", {"type": "text", "text": ""})
            yield self._add(text)
        self._blank = written[len(text) :]

    def _add(self, text: str) -> Json:
        self.content[-1]["text"] += text
        return self._delta(type="text_delta", text=text)

    def _call(self, call: CallPiece) -> Iterator[Json]:
        if call.name is not None:
            block = {"type": "tool_use", "id": call_id(), "name": call.name, "input": {}}
            yield from self._begin("tool_use", block)
            self._input = ""
        self._input += call.arguments
        if call.arguments:
            yield self._delta(type="input_json_delta", partial_json=call.arguments)

    def _begin(self, kind: Kind, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._open, self._blank = kind, ""
        self.content.append(block)
        yield self._event("content_block_start", content_block=dict(block))

    def _close(self) -> Iterator[Json]:
        if self._open is None:
            return
        block = self.content[-1]
        if self._open == "thinking":
            # A client sends it back, and some drop reasoning without one.
            block["signature"] = hashlib.sha256(self._thought.encode()).hexdigest()
            yield self._delta(type="signature_delta", signature=block["signature"])
        elif self._open == "tool_use":
            block["input"] = _input(self._input)
        yield self._event("content_block_stop")
        self._open = None

    def _delta(self, **delta: str) -> Json:
        return self._event("content_block_delta", delta=delta)

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "index": len(self.content) - 1, **fields}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _input(text: str) -> Json:
    """A call's input; of one that was cut off, what is certain, as Anthropic's library reads it."""
    try:
        value = from_json(text, allow_partial=True)
    except ValueError:  # not even the beginning of JSON
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class MessageAnswer:
    """A chat under way whose answer is a message."""

    chat: Chat
    writer: MessageWriter
    split_usage: bool  # the usage tells apart what was found in the prefix cache

    @property
    def headers(self) -> dict[str, str]:
        return request_selection.headers(self.chat.generation.account.opened.assignment)

    @property
    def usage(self) -> Json:
        """Anthropic's usage: `input_tokens` are those that no cache_... field counts."""
        made = self.chat.generation
        cached = made.cached_tokens if self.split_usage else 0
        return {
            "input_tokens": made.account.opened.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,  # keeping a prefix costs nothing here
            "cache_read_input_tokens": cached,
            "output_tokens": made.completion_tokens,
        }

    async def whole(self) -> Json:
        """The message as one JSON object."""
        ended: Json = {}
        async with aclosing(self.events()) as events:
            async for event in events:
                if event["type"] == "message_delta":
                    ended = event
        message = self._message(self.writer.content)
        return {**message, **ended["delta"], "usage": ended["usage"]}

    async def events(self) -> AsyncGenerator[Json, None]:
        """The message's events from its start to its stop."""
        generation, reader, writer = self.chat.generation, self.chat.reader(), self.writer
        started, ending = False, None
        async with aclosing(generation.pieces()) as pieces:
            async for _, piece in pieces:
                if not started:
                    started = True
                    yield {"type": "message_start", "message": self._message([])}
                    yield {"type": "ping"}
                ending = piece.ending
                for event in writer.push(reader.push(piece.text, final=ending is not None)):
                    yield event
        await generation.account.settled()
        for event in writer.finish():
            yield event
        yield {"type": "message_delta", "delta": self._ended(ending), "usage": self.usage}
        yield {"type": "message_stop"}

    def _message(self, content: Sequence[Json]) -> Json:
        opened = self.chat.generation.account.opened
        message: Json = {
            "id": opened.request_id,
            "type": "message",
            "role": "assistant",
            "model": opened.model,
            "content": list(content),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**self.usage, "output_tokens": 0},
        }
        if opened.assignment is not None:
            message["quickchange"] = request_selection.shown(opened.assignment)
        return message

    def _ended(self, ending: Ending | None) -> Json:
        """Why the message ended: a call that a stop sequence cut off must not be run."""
        stopped_by = self.chat.generation.choices[0].stopped_by
        reason: StopReason = "end_turn"
        if ending == "length":
            reason = "max_tokens"
        elif self.writer.called and (stopped_by is None or self.writer.whole_call):
            reason = "tool_use"
        elif stopped_by is not None:
            reason = "stop_sequence"
        sequence = stopped_by if reason == "stop_sequence" else None
        return {"stop_reason": reason, "stop_sequence": sequence}
