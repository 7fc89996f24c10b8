"""The JSON of OpenAI's two generation routes: choices, chunks, log-probabilities, usage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from quickchange_server.messages import TokenLogprobs
from quickchange_server.text import Text
from quickchange_server.transcript import Ending, LoggedToken, Piece

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks; OpenAI's API does the same

Json = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def predictions(drafted: int, accepted: int) -> Json:
    """The part of the usage that tells of drafts, in OpenAI's own fields for predicted output."""
    details = {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
    }
    return {"completion_tokens_details": details}


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


class Shape(ABC):
    """How one route writes what is generated."""

    object: str  # of the whole answer
    chunk_object: str  # of one streamed event

    def __init__(self, text: Text, logprobs: bool) -> None:
        self._text = text
        self._logprobs = logprobs

    @abstractmethod
    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        """A complete choice."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> Json:
        """What one piece adds to a choice."""

    def opening(self, _index: int) -> Json | None:
        """What a stream says of a choice before its first piece."""
        return None


class ChatShape(Shape):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._content(tokens),
            "finish_reason": ending,
        }

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece) -> Json:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._content(piece.tokens),
            "finish_reason": piece.ending,
        }

    def _content(self, tokens: Sequence[LoggedToken]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(t.logprobs) for t in tokens], "refusal": None}

    def _entry(self, logprobs: TokenLogprobs) -> Json:
        top = [self._token(token_id, logprob) for token_id, logprob in logprobs.top]
        return {**self._token(logprobs.token_id, logprobs.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> Json:
        raw = self._text.token_bytes(token_id)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": finite(logprob),
            "bytes": list(raw),
        }


class CompletionShape(Shape):
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._lists(tokens),
            "finish_reason": ending,
        }

    def chunk(self, index: int, piece: Piece) -> Json:
        return self.choice(index, piece.text, piece.tokens, piece.ending)

    def _lists(self, tokens: Sequence[LoggedToken]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "tokens": [self._name(token.logprobs.token_id) for token in tokens],
            "token_logprobs": [finite(token.logprobs.logprob) for token in tokens],
            "top_logprobs": [self._top(token.logprobs) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the sampled one, by text."""
        entries = [(logprobs.token_id, logprobs.logprob), *logprobs.top]
        return {self._name(token_id): finite(logprob) for token_id, logprob in entries}

    def _name(self, token_id: int) -> str:
        """The token's text; part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
        raw = self._text.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
