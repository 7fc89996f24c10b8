"""JSON of the answers of OpenAI's two generation routes: choices, chunks, log-probabilities, usage.

One `Shape` writes the choices of one answer: `CompletionShape`, `PromptShape` (OpenAI's `echo`,
vLLM's `prompt_logprobs`) and chats' own.
Knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.frontend.generation import Choice
from quickchange_server.frontend.output_processor import Ending, LoggedToken, Piece
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # for minus infinity, which JSON lacks; OpenAI's API does the same


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """OpenAI's usage object, from counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def predictions(drafted: int, accepted: int) -> Json:
    """The usage's counts of draft tokens, in OpenAI's fields for predicted output."""
    details = {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
    }
    return {"completion_tokens_details": details}


def finite(logprob: float) -> float:
    """The log-probability, raised to `LOWEST_LOGPROB` if below."""
    return max(logprob, LOWEST_LOGPROB)


class Shape(ABC):
    """The way one route writes the choices of an answer."""

    object: str  # the field "object" of a whole answer
    chunk_object: str  # the same field of a streamed event

    def __init__(self, text: Text, logprobs: bool) -> None:
        self._text = text
        self._logprobs = logprobs

    @abstractmethod
    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        """A complete choice."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> list[Json]:
        """The choices of the events that tell what one piece adds; none if it adds nothing."""

    def opening(self, _index: int) -> list[Json]:
        """The choices of the events before a choice's first piece."""
        return []


class CompletionShape(Shape):
    """Choices of completions, as text."""

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

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        return [self.choice(index, piece.text, piece.tokens, piece.ending)]

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
        """Log-probabilities of the best tokens and the sampled one, by text."""
        entries = [(logprobs.token_id, logprobs.logprob), *logprobs.top]
        return {self._name(token_id): finite(logprob) for token_id, logprob in entries}

    def _name(self, token_id: int) -> str:
        """The token's text; part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
        raw = self._text.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True, slots=True)
class PromptReport:
    """A prompt as an answer repeats it."""

    text: str  # the client's text, or the decoded text of the token ids it sent
    ids: tuple[int, ...]
    offsets: tuple[int, ...]  # where each token begins, in characters


def prompt_report(text: Text, sent: str | None, ids: Sequence[int]) -> PromptReport:
    """The prompt to repeat, as `sent` if that was text. Special tokens have no text."""
    detokenizer = text.detokenizer(skip_special_tokens=True)
    parts: list[str] = []
    offsets: list[int] = []
    length = 0
    for token_id in ids:
        offsets.append(length)
        parts.append(detokenizer.push(token_id))
        length += len(parts[-1])
    own = "".join([*parts, detokenizer.finish()])
    return PromptReport(own if sent is None else sent, tuple(ids), tuple(offsets))


class PromptShape(CompletionShape):
    """Completion choices that repeat their prompt, or carry its log-probabilities, or both."""

    def __init__(
        self,
        text: Text,
        body: CompletionRequest,
        prompts: Sequence[PromptReport],
        choices: Sequence[Choice],
    ) -> None:
        super().__init__(text, body.logprobs is not None)
        self._body = body
        self._prompts = prompts
        self._choices = choices

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        number = index // self._body.n
        prompt = self._prompts[number]
        scores = self._choices[number * self._body.candidates].prompt_logprobs
        written = super().choice(index, text, self._behind(prompt, tokens), ending)
        if self._body.echo:
            written["text"] = prompt.text + text
            if written["logprobs"] is not None:
                before = self._prompt_lists(prompt, scores)
                written["logprobs"] = {k: before[k] + v for k, v in written["logprobs"].items()}
        if self._body.prompt_logprobs is not None:
            written["prompt_logprobs"] = self._by_token(scores, self._body.prompt_logprobs)
        return written

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        tokens = self._behind(self._prompts[index // self._body.n], piece.tokens)
        return [super().choice(index, piece.text, tokens, piece.ending)]

    def opening(self, index: int) -> list[Json]:
        if not self._body.echo:
            return []
        prompt = self._prompts[index // self._body.n]
        written = super().choice(index, prompt.text, (), None)
        if written["logprobs"] is not None:
            written["logprobs"] = self._prompt_lists(prompt, self._choices[index].prompt_logprobs)
        return [written]

    def _behind(self, prompt: PromptReport, tokens: Sequence[LoggedToken]) -> Sequence[LoggedToken]:
        """The tokens of a choice, with offsets that count the echoed prompt."""
        if not self._body.echo:
            return tokens
        return [replace(token, offset=len(prompt.text) + token.offset) for token in tokens]

    def _prompt_lists(self, prompt: PromptReport, scores: Sequence[TokenLogprobs]) -> Json:
        """The prompt's part of a choice's `logprobs`; the first token has no log-probability."""
        top = self._body.logprobs or 0
        cut = [score._replace(top=score.top[:top]) for score in scores]
        return {
            "tokens": [self._name(token_id) for token_id in prompt.ids],
            "token_logprobs": [None, *(finite(score.logprob) for score in cut)],
            "top_logprobs": [None, *(self._top(score) for score in cut)],
            "text_offset": list(prompt.offsets),
        }

    def _by_token(self, scores: Sequence[TokenLogprobs], top: int) -> list[Json | None]:
        """vLLM's form: per token, except the first, its entry and the `top` best, by token id."""
        return [None, *(self._position(score, top) for score in scores)]

    def _position(self, score: TokenLogprobs, top: int) -> Json:
        return {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self._name(token_id),
            }
            for token_id, (logprob, rank) in score.ranked(top).items()
        }
