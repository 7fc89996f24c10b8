"""JSON bodies and headers of LoRAX's answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import quote

from quickchange_server.api.app_state import Services
from quickchange_server.api.lorax.requests import Parameters
from quickchange_server.api.openai.responses import finite
from quickchange_server.frontend.generation import Choice
from quickchange_server.frontend.output_processor import Ending, LoggedToken, Piece
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import TokenLogprobs

FinishReason = Literal["length", "eos_token", "stop_sequence"]
DEFAULT_SOURCE = "local"  # adapters come from this server's store


@dataclass
class Candidate:
    """One generated sequence as it grows."""

    seed: int | None  # None: greedy
    text: str = ""
    tokens: list[LoggedToken] = field(default_factory=list)
    ending: Ending | None = None

    def add(self, piece: Piece) -> tuple[LoggedToken, ...]:
        """Append a piece; returns its tokens."""
        self.text += piece.text
        self.ending = piece.ending
        tokens = piece.tokens
        if piece.ending is not None and tokens:
            # A stop string may end inside the last token, or the text inside a character.
            last = replace(tokens[-1], text=self.text[tokens[-1].offset :])
            tokens = (*tokens[:-1], last)
        self.tokens.extend(tokens)
        return tokens

    def finish_reason(self, text: Text) -> FinishReason:
        if self.ending == "length":
            return "length"
        last = self.tokens[-1].logprobs.token_id if self.tokens else None
        return "eos_token" if last in text.eos_ids else "stop_sequence"

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability, by which LoRAX ranks the candidates of `best_of`."""
        logprobs = [token.logprobs.logprob for token in self.tokens]
        return sum(logprobs) / max(1, len(logprobs))


class Shapes:
    """The way one request's answer is written."""

    def __init__(self, text: Text, parameters: Parameters, inputs: str) -> None:
        self._text = text
        self._parameters = parameters
        self._before = inputs if parameters.return_full_text else ""

    def token(self, token: LoggedToken) -> Json:
        """A generated token. A special one has its own text here, but none in the whole text."""
        scores, special = token.logprobs, token.logprobs.token_id in self._text.special_ids
        shown: Json = {
            "id": scores.token_id,
            "text": self._alone(scores.token_id) if special else token.text,
            "logprob": finite(scores.logprob),
            "special": special,
            "skipped": token.drafted,
        }
        wanted = self._parameters.return_k_alternatives
        if wanted is not None:
            shown["alternative_tokens"] = [
                {"id": id_, "text": self._alone(id_), "logprob": finite(logprob)}
                for id_, logprob in scores.top[:wanted]
            ]
        return shown

    def top(self, tokens: Sequence[LoggedToken]) -> list[list[Json]]:
        """The best tokens at the place of each, in TGI's form; empty unless requested."""
        wanted, special = self._parameters.top_n_tokens, self._text.special_ids
        if not wanted:
            return []
        return [
            [
                {
                    "id": id_,
                    "text": self._alone(id_),
                    "logprob": finite(logprob),
                    "special": id_ in special,
                }
                for id_, logprob in token.logprobs.top[:wanted]
            ]
            for token in tokens
        ]

    def prefill(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[Json]:
        """The prompt's tokens, the first without log-probability; empty unless requested."""
        if not self._parameters.decoder_input_details:
            return []
        known = [None, *(finite(scores.logprob) for scores in logprobs)]
        return [
            {"id": token_id, "text": self._alone(token_id), "logprob": logprob}
            for token_id, logprob in zip(prompt, known, strict=True)
        ]

    def generated_text(self, candidate: Candidate) -> str:
        return self._before + candidate.text

    def ending(self, candidate: Candidate, choice: Choice) -> Json:
        """Fields that all kinds of details share. `choice` generated the candidate."""
        return {
            "finish_reason": candidate.finish_reason(self._text),
            "generated_tokens": choice.completion_tokens,
            "skipped_tokens": choice.accepted_tokens,
            "seed": candidate.seed,
        }

    def _alone(self, token_id: int) -> str:
        return self._text.token_bytes(token_id).decode(errors="replace")


@dataclass
class RequestTimes:
    """Times of a request's milestones, for its headers. Monotonic seconds."""

    began: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float | None = None

    def admit(self) -> None:
        self.admitted = time.monotonic()

    def token(self) -> None:
        if self.first_token is None:
            self.first_token = time.monotonic()


def identity(
    services: Services, parameters: Parameters, inputs: str, prompt: int
) -> dict[str, str]:
    """Headers that are known before the first token."""
    known = {
        "x-model-id": _header(services.catalog.base_name),
        "x-prompt-tokens": str(prompt),
        "x-compute-type": services.settings.device,
        "x-compute-characters": str(len(inputs)),
    }
    merged = parameters.merged_adapters
    ids = [parameters.adapter_id or ""] if merged is None else merged.ids
    if any(ids):
        known["x-adapter-id"] = _header(",".join(ids))
        known["x-adapter-source"] = parameters.adapter_source or DEFAULT_SOURCE
    return known


def accounting(clock: RequestTimes, choice: Choice, prompt: int) -> dict[str, str]:
    """Headers that are known at the end: times in whole milliseconds, and token counts."""
    total = time.monotonic() - clock.began
    validation = clock.admitted - clock.began
    queue = choice.queue_seconds
    inference = max(0.0, total - validation - queue)
    generated = choice.completion_tokens
    first = total if clock.first_token is None else clock.first_token - clock.began
    return {
        "x-total-time": _milliseconds(total),
        "x-compute-time": _milliseconds(total),
        "x-validation-time": _milliseconds(validation),
        "x-queue-time": _milliseconds(queue),
        "x-inference-time": _milliseconds(inference),
        "x-time-per-token": _milliseconds(inference / max(1, generated)),
        "x-time-to-first-token": _milliseconds(first),
        "x-generated-tokens": str(generated),
        "x-skipped-tokens": str(choice.accepted_tokens),
        "x-total-tokens": str(prompt + generated),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _header(value: str) -> str:
    """The value as a header can carry it: percent-encoded unless printable ASCII."""
    return value if value.isascii() and value.isprintable() else quote(value, safe="/:@,")
