"""What a prompt becomes for the engine, and its result of what the engine gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quickchange_server.adapter_registry.resolver import Selection
from quickchange_server.entrypoints.in_process_engine import EngineCompletion
from quickchange_server.entrypoints.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    generated_position,
    prompt_positions,
)
from quickchange_server.entrypoints.python_api.given_prompts import AskedPrompt
from quickchange_server.errors import EngineFailedError, InvalidRequestError
from quickchange_server.frontend.context_length import room
from quickchange_server.frontend.embedding import unit, vector
from quickchange_server.frontend.output_processor import Ending, Transcript
from quickchange_server.frontend.request_admission import Seeds, choice_seed
from quickchange_server.protocol import Delta, SamplingParams, Submit


@dataclass(slots=True)
class PromptChoice:
    """One sequence of a call, with its text so far."""

    submit: Submit
    transcript: Transcript
    parts: list[str] = field(default_factory=list)
    ending: Ending | None = None

    def push(self, delta: Delta) -> bool:
        """Add a delta; true if the choice is complete, at a stop string or otherwise."""
        piece = self.transcript.push(delta)
        self.parts.append(piece.text)
        self.ending = piece.ending
        return piece.ending is not None


class AnswerMaker:
    """Makes the sequences of a call's prompts, and their results, in a context of `most` tokens."""

    def __init__(self, seeds: Seeds, most: int) -> None:
        self._seeds = seeds
        self._most = most

    def choices(
        self, index: int, asked: AskedPrompt, params: SamplingParams, selection: Selection
    ) -> list[PromptChoice]:
        """The sequences of one prompt, one per choice."""
        text = asked.spoken
        for name in ("stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
            text.check_ids(sorted(getattr(params, name)), name)
        text.check_ids(list(params.logit_bias), "logit_bias")
        front = selection.virtual_tokens
        fits = room(self._most, len(asked.ids), params.max_tokens, asked.place, front)
        most = fits if params.max_tokens is None else params.max_tokens
        if params.min_tokens > most:
            raise InvalidRequestError(
                f"min_tokens: {params.min_tokens} exceeds the {most} tokens that fit behind "
                f"{asked.place}; lower it",
                param="min_tokens",
            )
        sampling = params.resolved(
            max_tokens=most, eos_ids=text.eos_ids, vocab_size=text.vocab_size
        )
        seed = self._seeds.draw() if params.seed is None else params.seed % 2**64
        first = Submit(
            f"{index}-0",
            asked.ids,
            sampling,
            selection.serving(asked.ids),
            drafting=selection.drafting,
            bad_tokens=text.spellings(params.bad_words),
            seed=seed,
        )
        others = replace(sampling, prompt_logprobs=None)  # the first choice's serve all
        submits = [first] + [
            replace(
                first,
                request_id=f"{index}-{number}",
                sampling=others,
                seed=choice_seed(seed, number),
            )
            for number in range(1, params.n)
        ]
        return [PromptChoice(submit, Transcript(text, sampling)) for submit in submits]

    def output(
        self,
        request_id: str,
        asked: AskedPrompt,
        params: SamplingParams,
        answers: Sequence[tuple[PromptChoice, EngineCompletion]],
    ) -> RequestOutput:
        """A prompt's result, of its choices and what the engine gave for each."""
        _, first = answers[0]
        return RequestOutput(
            request_id=request_id,
            prompt=asked.text,
            prompt_token_ids=list(asked.ids),
            prompt_logprobs=prompt_positions(
                asked.spoken, first.prompt_logprobs, params.prompt_logprobs
            ),
            outputs=[
                self._completion(number, asked, choice, completion, params)
                for number, (choice, completion) in enumerate(answers)
            ],
            num_cached_tokens=first.cached_tokens,
        )

    def _completion(
        self,
        index: int,
        asked: AskedPrompt,
        choice: PromptChoice,
        completion: EngineCompletion,
        params: SamplingParams,
    ) -> CompletionOutput:
        # Fewer than the engine's tokens if a stop string ended amid accepted drafts.
        count = choice.transcript.completion_tokens
        ids, scores = list(completion.token_ids[:count]), completion.logprobs[:count]
        if choice.ending is None:
            raise EngineFailedError(
                f"request {choice.submit.request_id}: it ended without a reason"
            )
        ended_by = ids[-1] if choice.ending == "stop" and ids else None
        scored = params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(choice.parts),
            token_ids=ids,
            cumulative_logprob=sum(one.logprob for one in scores) if scored else None,
            logprobs=[generated_position(asked.spoken, one, params) for one in scores]
            if scored
            else None,
            finish_reason=choice.ending,
            stop_reason=choice.transcript.stopped_by
            or (ended_by if ended_by in params.stop_token_ids else None),
            drafted_tokens=choice.transcript.drafted_tokens,
            accepted_tokens=choice.transcript.accepted_tokens,
        )


def embedded(
    request_id: str, asked: AskedPrompt, completion: EngineCompletion, normalize: bool
) -> EmbeddingRequestOutput:
    """A prompt's vector."""
    if completion.embedding is None:
        raise EngineFailedError(f"{asked.place}: the engine ended it without a vector; try again")
    state = vector(completion.embedding)
    numbers: list[float] = (unit(state) if normalize else state).tolist()
    return EmbeddingRequestOutput(request_id, list(asked.ids), EmbeddingOutput(numbers))
