"""JSON of the answers of OpenAI's two generation routes: choices, chunks, log-probabilities, usage.

One `Shape` writes the choices of one answer: `CompletionShape`, `EchoShape` (OpenAI's `echo`) and
chats' own. `TokenReport` adds vLLM's fields.
Knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_server.api.openai.requests import CompletionRequest, GenerationRequest
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


def by_id(token_id: int) -> str:
    """A token in vLLM's way to name it by its id."""
    return f"token_id:{token_id}"


def token_text(text: Text, token_id: int) -> str:
    """The token's text; part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
    raw = text.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Shape(ABC):
    """The way one route writes the choices of an answer."""

    object: str  # the field "object" of a whole answer
    chunk_object: str  # the same field of a streamed event

    def __init__(self, text: Text, logprobs: bool, *, as_ids: bool = False) -> None:
        """`as_ids`: log-probabilities name tokens by their ids, as vLLM does if asked."""
        self._text = text
        self._logprobs = logprobs
        self._as_ids = as_ids

    @abstractmethod
    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        """A complete choice."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> list[Json]:
        """The choices of the events that tell what one piece adds; none if it adds nothing."""

    def reasoning_tokens(self, _choices: Sequence[Choice]) -> int | None:
        """Tokens of the choices' thoughts so far; None where thoughts are not split off."""
        return None

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
        return by_id(token_id) if self._as_ids else token_text(self._text, token_id)


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


class EchoShape(CompletionShape):
    """Completion choices that repeat their prompt."""

    def __init__(
        self,
        text: Text,
        body: CompletionRequest,
        prompts: Sequence[PromptReport],
        choices: Sequence[Choice],
    ) -> None:
        super().__init__(text, body.logprobs is not None, as_ids=body.return_tokens_as_token_ids)
        self._body = body
        self._prompts = prompts
        self._choices = choices

    def choice(
        self, index: int, text: str, tokens: Sequence[LoggedToken], ending: Ending | None
    ) -> Json:
        number = index // self._body.n
        prompt = self._prompts[number]
        scores = self._choices[number * self._body.candidates].prompt_logprobs
        written = super().choice(index, prompt.text + text, self._behind(prompt, tokens), ending)
        if written["logprobs"] is not None:
            before = self._prompt_lists(prompt, scores)
            written["logprobs"] = {k: before[k] + v for k, v in written["logprobs"].items()}
        return written

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        tokens = self._behind(self._prompts[index // self._body.n], piece.tokens)
        return [super().choice(index, piece.text, tokens, piece.ending)]

    def opening(self, index: int) -> list[Json]:
        prompt = self._prompts[index // self._body.n]
        written = super().choice(index, prompt.text, (), None)
        if written["logprobs"] is not None:
            written["logprobs"] = self._prompt_lists(prompt, self._choices[index].prompt_logprobs)
        return [written]

    def _behind(self, prompt: PromptReport, tokens: Sequence[LoggedToken]) -> Sequence[LoggedToken]:
        """The tokens of a choice, with offsets that count the echoed prompt."""
        return [replace(token, offset=len(prompt.text) + token.offset) for token in tokens]

    def _prompt_lists(self, prompt: PromptReport, scores: Sequence[TokenLogprobs]) -> Json:
        """The prompt's part of a choice's `logprobs`; the first token has no log-probability."""
        top = self._body.logprobs or 0
        cut = [score._replace(top=score.best(top)) for score in scores]
        return {
            "tokens": [self._name(token_id) for token_id in prompt.ids],
            "token_logprobs": [None, *(finite(score.logprob) for score in cut)],
            "top_logprobs": [None, *(self._top(score) for score in cut)],
            "text_offset": list(prompt.offsets),
        }


class TokenReport:
    """vLLM's fields of an answer: token ids, log-probabilities of prompts, what stopped a choice.

    Those of the prompt stand in each choice, or beside the choices where there is one prompt alone.
    """

    def __init__(
        self,
        text: Text,
        body: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Choice],
        *,
        in_choices: bool,
    ) -> None:
        self._text = text
        self._body = body
        self._prompts = prompts
        self._choices = choices
        self._in_choices = in_choices
        self._held: dict[int, list[int]] = {}  # ids that no event has had, by choice
        self._begun: set[int] = set()  # choices that have had an event

    def of_answer(self) -> Json:
        """Fields of a whole answer."""
        return {} if self._in_choices else self._of_prompt(0)

    def of_choice(self, index: int, ids: Sequence[int], stop_reason: str | int | None) -> Json:
        """Fields of a whole choice."""
        own = {
            "stop_reason": stop_reason,
            "token_ids": list(ids) if self._body.return_token_ids else None,
        }
        return own | (self._of_prompt(index // self._body.n) if self._in_choices else {})

    def add_to_events(self, index: int, choices: list[Json], piece: Piece) -> Json:
        """Add the fields of a piece to the choices of its events; returns those of the first."""
        if choices and piece.stop_reason is not None:
            choices[-1]["stop_reason"] = piece.stop_reason
        if not self._body.return_token_ids:
            return {}
        held = self._held.setdefault(index, [])
        held += piece.ids
        if not choices:
            return {}
        for choice in choices:
            choice["token_ids"] = []
        choices[-1]["token_ids"], self._held[index] = held, []
        first = not self._begun if not self._in_choices else index not in self._begun
        self._begun.add(index)
        if not first:
            return {}
        told = {"prompt_token_ids": list(self._prompts[index // self._body.n])}
        if not self._in_choices:
            return told
        choices[0] |= told
        return {}

    def _of_prompt(self, number: int) -> Json:
        top = self._body.prompt_logprobs
        scores = self._choices[number * self._body.candidates].prompt_logprobs
        return {
            "prompt_logprobs": None if top is None else self._by_token(scores, top),
            "prompt_token_ids": list(self._prompts[number])
            if self._body.return_token_ids
            else None,
        }

    def _by_token(self, scores: Sequence[TokenLogprobs], top: int) -> list[Json | None]:
        """vLLM's form: per token, except the first, its entry and the `top` best, by token id."""
        return [None, *(self._position(score, top) for score in scores)]

    def _position(self, score: TokenLogprobs, top: int) -> Json:
        return {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": token_text(self._text, token_id),
            }
            for token_id, (logprob, rank) in score.ranked(top).items()
        }
