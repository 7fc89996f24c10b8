"""JSON of the answers of chats: messages and deltas, tool calls taken out of their text."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence

from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.openai.responses import Shape, by_id, finite
from quickchange_server.frontend.generation import Choice
from quickchange_server.frontend.output_processor import Ending, LoggedToken, Piece
from quickchange_server.frontend.parsing.message_reader import (
    CallPiece,
    MessagePiece,
    MessageReader,
)
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import TokenLogprobs

_ID_LENGTH = 9  # letters and digits: what the strictest chat template takes
_ID_CHARACTERS = string.ascii_letters + string.digits


def call_id() -> str:
    """A new id of a tool call."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def logprob_entry(text: Text, logprobs: TokenLogprobs, *, as_ids: bool = False) -> Json:
    """A token with its log-probability and the best ones beside it, in OpenAI's form for chats.

    as_ids: tokens are named by their ids.
    """

    def told(token_id: int, logprob: float) -> Json:
        raw = text.token_bytes(token_id)
        return {
            "token": by_id(token_id) if as_ids else raw.decode(errors="replace"),
            "logprob": finite(logprob),
            "bytes": list(raw),
        }

    top = [told(token_id, logprob) for token_id, logprob in logprobs.top]
    return {**told(logprobs.token_id, logprobs.logprob), "top_logprobs": top}


class ChatShape(Shape):
    """Choices of chats, as messages and deltas."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, text: Text, body: ChatRequest, reader: Callable[[], MessageReader], *, splits: bool
    ) -> None:
        """`reader` makes one parser per choice. splits: it splits thoughts off."""
        super().__init__(text, body.logprobs, as_ids=body.return_tokens_as_token_ids)
        self._body = body
        self._reader = reader
        self._splits = splits
        self._readers: dict[int, MessageReader] = {}
        self._called: set[int] = set()  # choices with a call

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        reader = self._readers[index] = self._reader()
        said = reader.push(text, final=True)
        content: str | None = self._body.echoed + said.content
        if said.reasoning:
            content = content or None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        message |= self._thought(said)
        if said.calls:
            message["content"] = (content or "").strip() or None
            message["tool_calls"] = _whole(said.calls)
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(tokens),
            "finish_reason": _reason(ending, called=bool(said.calls)),
        }

    def opening(self, index: int) -> list[Json]:
        deltas = [{"role": "assistant", "content": ""}]
        if self._body.echoed:
            deltas.append({"content": self._body.echoed})
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._reader()
        said = reader.push(piece.text, final=piece.ending is not None)
        delta = self._thought(said) | _delta(said)
        if not delta and not (piece.tokens and self._logprobs) and piece.ending is None:
            return []
        if said.calls:
            self._called.add(index)
        shown = {
            "index": index,
            "delta": delta,
            "logprobs": self._content(piece.tokens) if piece.tokens else None,
        }
        ending = _reason(piece.ending, called=index in self._called)
        if ending is None or not said.calls:
            return [{**shown, "finish_reason": ending}]
        # OpenAI's client counts a call as finished only if an event follows it.
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": ending}
        return [{**shown, "finish_reason": None}, last]

    def reasoning_tokens(self, choices: Sequence[Choice]) -> int | None:
        if not self._splits:
            return None
        return sum(
            choices[index].tokens_within(reader.reasoning_spans)
            for index, reader in self._readers.items()
        )

    def _thought(self, said: MessagePiece) -> Json:
        """The fields of a thought: vLLM's name, and the one that DeepSeek's clients read."""
        if not said.reasoning or not self._body.include_reasoning:
            return {}
        return {"reasoning": said.reasoning, "reasoning_content": said.reasoning}

    def _content(self, tokens: Sequence[LoggedToken]) -> Json | None:
        if not self._logprobs:
            return None
        entries = [logprob_entry(self._text, t.logprobs, as_ids=self._as_ids) for t in tokens]
        return {"content": entries, "refusal": None}


def _delta(said: MessagePiece) -> Json:
    delta: Json = {"content": said.content} if said.content else {}
    if said.calls:
        delta["tool_calls"] = [_part(call) for call in said.calls]
    return delta


def _part(call: CallPiece) -> Json:
    """A piece of a call in a delta: its id and name come first."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call_id(), "type": "function", "function": function}


def _whole(pieces: Sequence[CallPiece]) -> list[Json]:
    """The calls of a message that is complete."""
    calls: list[Json] = []
    for piece in pieces:
        if piece.name is not None:
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": call_id(), "type": "function", "function": function})
        calls[-1]["function"]["arguments"] += piece.arguments
    return calls


def _reason(ending: Ending | None, *, called: bool) -> str | None:
    """The finish reason; one that was cut off says so, with calls or without."""
    return "tool_calls" if called and ending == "stop" else ending
