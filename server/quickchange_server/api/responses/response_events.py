"""Output items of a response as its text comes, and the events that tell of them.

A response is a list of items: reasoning, a message, function calls. At most one is open, the last;
what comes next either continues it or closes it. Whole answers are made of the same items. An event
holds the item itself, which goes on growing: write it out before asking for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quickchange_server.api.openai.chat.chat_responses import call_id, logprob_entry
from quickchange_server.api.responses.response_context import item_id
from quickchange_server.frontend.output_processor import Ending, LoggedToken, Piece
from quickchange_server.frontend.parsing.message_reader import CallPiece, MessageReader
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.tokenizer import Text


class OutputWriter:
    """The output items of one response."""

    def __init__(
        self,
        response_id: str,
        text: Text,
        reader: MessageReader,
        *,
        logprobs: bool,
        reasoning: bool,
    ) -> None:
        """`reasoning`: it is told."""
        self.items: list[Json] = []
        self._reasoned = reasoning
        self._response_id = response_id
        self._text = text
        self._reader = reader
        self._logged = logprobs
        self._waiting: list[LoggedToken] = []  # tokens whose text has not been told yet
        self._blanks = ""  # whitespace that may turn out to stand before a call
        self._open: str | None = None  # type of the last item, if it may go on
        self._call: int | None = None  # index of the open call

    @property
    def reasoning_spans(self) -> Sequence[tuple[int, int]]:
        """Where reasoning stands in the answer's text so far, in characters: from, to."""
        return self._reader.reasoning_spans

    def push(self, piece: Piece) -> Iterator[Json]:
        """Add a piece; the events that it makes, without their numbers."""
        said = self._reader.push(piece.text, final=piece.ending is not None)
        if self._logged:
            self._waiting += piece.tokens
        if said.reasoning and self._reasoned:
            yield from self._reason(said.reasoning)
        for call in said.continued:
            yield from self._continue_call(call)
        if said.content:
            yield from self._say(said.content)
        for call in said.begun:
            yield from self._continue_call(call)
        if piece.ending is not None:
            yield from self._finish(piece.ending)

    def cut(self) -> Iterator[Json]:
        """Close what is open, as incomplete."""
        yield from self._close("incomplete")

    def _reason(self, text: str) -> Iterator[Json]:
        if self._open != "reasoning":
            yield from self._close()
            yield from self._begin({"type": "reasoning", "summary": [], "content": []})
            yield from self._begin_part({"type": "reasoning_text", "text": ""})
        self._last["content"][0]["text"] += text
        yield self._event("response.reasoning_text.delta", content_index=0, delta=text)

    def _say(self, text: str) -> Iterator[Json]:
        if self._open != "message":
            self._blanks += text
            if not self._blanks.strip():
                return
            text = self._blanks
            yield from self._begin_message()
        yield from self._grow_message(text)

    def _grow_message(self, text: str) -> Iterator[Json]:
        part = self._last["content"][0]
        part["text"] += text
        logprobs = self._logprobs_of(text)
        part["logprobs"] += logprobs
        yield self._event(
            "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
        )

    def _begin_message(self) -> Iterator[Json]:
        yield from self._close()
        yield from self._begin({"type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        yield from self._begin_part(part)

    def _continue_call(self, call: CallPiece) -> Iterator[Json]:
        if call.index != self._call or self._open != "function_call":
            yield from self._close()
            item = {"type": "function_call", "call_id": call_id(), "name": call.name}
            yield from self._begin({**item, "arguments": ""})
            self._call = call.index
        if call.arguments:
            self._last["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _finish(self, ending: Ending) -> Iterator[Json]:
        if not self.items:  # an answer has one, if only of blanks
            blanks = self._blanks
            yield from self._begin_message()
            if blanks:
                yield from self._grow_message(blanks)
        if self._open == "message":
            self._last["content"][0]["logprobs"] += map(self._entry, self._waiting)  # without text
        yield from self._close("completed" if ending == "stop" else "incomplete")

    # --- the open item --------------------------------------------------------------------------

    @property
    def _last(self) -> Json:
        item: Json = self.items[-1]
        return item

    def _begin(self, item: Json) -> Iterator[Json]:
        kind = item["type"]
        self._blanks = ""
        self.items.append(
            {
                "id": item_id(self._response_id, kind, len(self.items)),
                "status": "in_progress",
                **item,
            }
        )
        self._open = kind
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": self._last,
        }

    def _begin_part(self, part: Json) -> Iterator[Json]:
        self._last["content"].append(part)
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _close(self, status: str = "completed") -> Iterator[Json]:
        """Close the open item, if there is one."""
        if self._open is None:
            return
        item, kind = self._last, self._open
        item["status"] = status
        self._open = None
        if kind == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            told = {"text": part["text"]}
            if kind == "message":
                told["logprobs"] = part["logprobs"]
            name = "output_text" if kind == "message" else "reasoning_text"
            yield self._event(f"response.{name}.done", content_index=0, **told)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.items) - 1,
            "item": item,
        }

    def _event(self, kind: str, **fields: object) -> Json:
        """An event about the last item."""
        place = {"item_id": self._last["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **place, **fields}

    # --- log-probabilities ----------------------------------------------------------------------

    def _logprobs_of(self, text: str) -> list[Json]:
        """Entries of the waiting tokens that make this text. Those before it, such as marks, are
        dropped; those behind it wait on."""
        begin = max(0, "".join(token.text for token in self._waiting).find(text))
        end, at, taken = begin + len(text), 0, 0
        found = []
        for token in self._waiting:
            if at >= end:
                break
            at += len(token.text)
            taken += 1
            if at > begin or (at == begin and not token.text):  # a part of a character
                found.append(self._entry(token))
        del self._waiting[:taken]
        return found

    def _entry(self, token: LoggedToken) -> Json:
        return logprob_entry(self._text, token.logprobs)
