"""Completions that tell of their prompt: OpenAI's `echo` and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_server.api.schemas import CompletionRequest
from quickchange_server.api.shapes import CompletionShape, Json, finite
from quickchange_server.choices import Choices
from quickchange_server.messages import TokenLogprobs
from quickchange_server.text import Text
from quickchange_server.transcript import Ending, LoggedToken, Piece


@dataclass(frozen=True, slots=True)
class ToldPrompt:
    """A prompt as an answer repeats it."""

    text: str  # as the client sent it; that of its tokens where it sent those
    ids: tuple[int, ...]
    offsets: tuple[int, ...]  # of each token, in characters


def told_prompt(text: Text, sent: str | None, ids: Sequence[int]) -> ToldPrompt:
    """sent: the client's text, where it sent text. Special tokens have none."""
    detokenizer = text.detokenizer(skip_special_tokens=True)
    parts: list[str] = []
    offsets: list[int] = []
    length = 0
    for token_id in ids:
        offsets.append(length)
        parts.append(detokenizer.push(token_id))
        length += len(parts[-1])
    own = "".join([*parts, detokenizer.finish()])
    return ToldPrompt(own if sent is None else sent, tuple(ids), tuple(offsets))


class PromptShape(CompletionShape):
    """Choices that begin with their prompt, or carry its log-probabilities, or both."""

    def __init__(
        self,
        text: Text,
        body: CompletionRequest,
        prompts: Sequence[ToldPrompt],
        choices: Choices,
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
        told = super().choice(index, text, self._behind(prompt, tokens), ending)
        if self._body.echo:
            told["text"] = prompt.text + text
            if told["logprobs"] is not None:
                before = self._prompt_lists(prompt, scores)
                told["logprobs"] = {k: before[k] + v for k, v in told["logprobs"].items()}
        if self._body.prompt_logprobs is not None:
            told["prompt_logprobs"] = self._by_token(scores, self._body.prompt_logprobs)
        return told

    def chunk(self, index: int, piece: Piece) -> Json:
        tokens = self._behind(self._prompts[index // self._body.n], piece.tokens)
        return super().choice(index, piece.text, tokens, piece.ending)

    def opening(self, index: int) -> Json | None:
        if not self._body.echo:
            return None
        prompt = self._prompts[index // self._body.n]
        told = super().choice(index, prompt.text, (), None)
        if told["logprobs"] is not None:
            told["logprobs"] = self._prompt_lists(prompt, self._choices[index].prompt_logprobs)
        return told

    def _behind(self, prompt: ToldPrompt, tokens: Sequence[LoggedToken]) -> Sequence[LoggedToken]:
        """The tokens of a choice, their offsets counted from where its text begins."""
        if not self._body.echo:
            return tokens
        return [replace(token, offset=len(prompt.text) + token.offset) for token in tokens]

    def _prompt_lists(self, prompt: ToldPrompt, scores: Sequence[TokenLogprobs]) -> Json:
        """The prompt's part of a choice's `logprobs`. Nothing stands before the first token."""
        top = self._body.logprobs or 0
        cut = [replace(score, top=score.top[:top]) for score in scores]
        return {
            "tokens": [self._name(token_id) for token_id in prompt.ids],
            "token_logprobs": [None, *(finite(score.logprob) for score in cut)],
            "top_logprobs": [None, *(self._top(score) for score in cut)],
            "text_offset": list(prompt.offsets),
        }

    def _by_token(self, scores: Sequence[TokenLogprobs], top: int) -> list[Json | None]:
        """vLLM's form: for each token but the first its own entry and the best, by token id."""
        told: list[Json | None] = [None]
        for score in scores:
            ranked: dict[int, tuple[float, int | None]]
            ranked = {token_id: (p, rank) for rank, (token_id, p) in enumerate(score.top[:top], 1)}
            ranked.setdefault(score.token_id, (score.logprob, self._rank(score)))
            told.append(
                {
                    str(token_id): {
                        "logprob": finite(logprob),
                        "rank": rank,
                        "decoded_token": self._name(token_id),
                    }
                    for token_id, (logprob, rank) in ranked.items()
                }
            )
        return told

    def _rank(self, score: TokenLogprobs) -> int | None:
        """Of the prompt's own token, where it is among the best that are known."""
        ids = [token_id for token_id, _ in score.top]
        return ids.index(score.token_id) + 1 if score.token_id in ids else None
