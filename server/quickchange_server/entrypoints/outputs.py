"""Results of `LLM`, with vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_server.frontend.output_processor import Ending
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability at one position, the model's own, before penalties and filters."""

    logprob: float
    rank: int | None  # from 1; None: not among the requested best
    decoded_token: str


Position = dict[int, Logprob]  # by token id


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice of a prompt. `token_ids` includes the token that ended it, `text` does not."""

    index: int  # from 0, within the prompt's choices
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # with `logprobs`
    logprobs: list[Position] | None  # one per token
    finish_reason: Ending
    stop_reason: int | str | None  # the stop string or stop token; None: end of sequence, length
    drafted_tokens: int  # draft tokens verified by the base model
    accepted_tokens: int  # tokens of token_ids that came from accepted drafts


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt with its choices."""

    request_id: str  # the prompt's place in the call
    prompt: str | None  # None if token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[Position | None] | None  # one per token; None for the first
    outputs: list[CompletionOutput]
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    finished: bool = True


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A vector of the model's hidden size."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt with its embedding."""

    request_id: str  # the prompt's place in the call
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


def position(text: Text, scores: TokenLogprobs, most: int) -> Position:
    """A position's own token and its `most` best ones."""
    return {
        token_id: Logprob(logprob, rank, text.token_bytes(token_id).decode(errors="replace"))
        for token_id, (logprob, rank) in scores.ranked(most).items()
    }


def generated_position(text: Text, scores: TokenLogprobs, params: SamplingParams) -> Position:
    """A generated position's own token, and the best ones or those that the parameters list."""
    if not params.logprob_token_ids:
        return position(text, scores, params.logprobs or 0)
    named = position(text, scores, len(scores.top))
    return {token_id: replace(one, rank=None) for token_id, one in named.items()}


def prompt_positions(
    text: Text, scores: Sequence[TokenLogprobs], most: int | None
) -> list[Position | None] | None:
    """One position per token of a prompt; None unless requested."""
    return None if most is None else [None, *(position(text, one, most) for one in scores)]
