"""What `LLM` returns, in vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quickchange_server.frontend.output_processor import Ending
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprob:
    """The model's own log-probability of a token at one position: before penalties and filters."""

    logprob: float
    rank: int | None  # from 1; None: the token is not among the best that were asked for
    decoded_token: str


Position = dict[int, Logprob]  # by token id


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. `token_ids` holds the token that ended it, which `text` leaves out."""

    index: int  # among the prompt's choices
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # with `logprobs`
    logprobs: list[Position] | None  # one a token
    finish_reason: Ending
    stop_reason: int | str | None  # the stop string or stop token; None: end of sequence, length
    drafted_tokens: int  # draft tokens that the base model has judged
    accepted_tokens: int  # of token_ids, those that came from drafts


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its choices."""

    request_id: str  # the prompt's place in the call
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[Position | None] | None  # one a token; the first has none
    outputs: list[CompletionOutput]
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    finished: bool = True


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A vector of the model's hidden size."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str  # the prompt's place in the call
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


def position(text: Text, scores: TokenLogprobs, most: int) -> Position:
    """The `most` best tokens of a position and its own."""
    return {
        token_id: Logprob(logprob, rank, text.token_bytes(token_id).decode(errors="replace"))
        for token_id, (logprob, rank) in scores.ranked(most).items()
    }


def prompt_positions(
    text: Text, scores: Sequence[TokenLogprobs], most: int | None
) -> list[Position | None] | None:
    """One for each token of a prompt, where they were asked for."""
    return None if most is None else [None, *(position(text, one, most) for one in scores)]
