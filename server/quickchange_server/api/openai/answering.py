"""Answers of OpenAI's generation routes, whole or as a stream of events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request, Response

from quickchange_server.api.app_state import Services
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.requests import GenerationRequest
from quickchange_server.api.openai.responses import Shape, TokenReport, predictions, usage
from quickchange_server.api.sse import DONE, event, event_stream, unless_gone
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.output_processor import Ending, LoggedToken
from quickchange_server.frontend.request_base import Json


@dataclass(frozen=True)
class Answer:
    """A request under way, and the shape of its answer."""

    envelope: Json  # fields that the whole answer and each event share, without "object"
    shape: Shape
    report: TokenReport
    generation: Generation
    drafting: bool  # the usage counts draft tokens
    n: int = 1  # choices returned for each prompt
    candidates: int = 1  # choices generated for each prompt; the best `n` are returned

    @property
    def headers(self) -> dict[str, str]:
        return request_selection.headers(self.generation.account.opened.assignment)

    @property
    def usage(self) -> Json:
        made = self.generation
        prompt_tokens = made.account.opened.prompt_tokens
        counts = usage(prompt_tokens, made.completion_tokens, made.cached_tokens)
        if self.drafting:
            counts |= predictions(made.drafted_tokens, made.accepted_tokens)
        reasoning = self.shape.reasoning_tokens(made.choices)
        if reasoning is not None:
            counts.setdefault("completion_tokens_details", {})["reasoning_tokens"] = reasoning
        return counts


@dataclass
class _Collected:
    """One choice of an answer that is not streamed."""

    parts: list[str] = field(default_factory=list)
    tokens: list[LoggedToken] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ending: Ending | None = None
    stop_reason: str | int | None = None

    @property
    def likelihood(self) -> float:
        """Mean log-probability per token; minus infinity without tokens."""
        logprobs = [token.logprobs.logprob for token in self.tokens]
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def _best(collected: list[_Collected], answer: Answer) -> list[_Collected]:
    """The likeliest `n` candidates of each prompt, the best first; without extra ones, all."""
    if answer.candidates <= answer.n:
        return collected
    best = []
    for first in range(0, len(collected), answer.candidates):
        candidates = collected[first : first + answer.candidates]
        best += sorted(candidates, key=lambda c: c.likelihood, reverse=True)[: answer.n]
    return best


async def whole(answer: Answer) -> Json:
    """The whole answer as one JSON object."""
    collected = [_Collected() for _ in answer.generation.choices]
    async with aclosing(answer.generation.pieces()) as pieces:
        async for index, piece in pieces:
            choice = collected[index]
            choice.parts.append(piece.text)
            choice.tokens.extend(piece.tokens)
            choice.ids.extend(piece.ids)
            choice.ending, choice.stop_reason = piece.ending, piece.stop_reason
    await answer.generation.account.settled()
    return {
        **answer.envelope,
        "object": answer.shape.object,
        "choices": [
            answer.shape.choice(index, "".join(choice.parts), choice.tokens, choice.ending)
            | answer.report.of_choice(index, choice.ids, choice.stop_reason)
            for index, choice in enumerate(_best(collected, answer))
        ],
        "usage": answer.usage,
        **answer.report.of_answer(),
    }


_COUNTED = ("completion_tokens", "total_tokens")


async def streamed(
    answer: Answer, include_usage: bool, continuous_usage: bool = False
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; pieces that tell nothing are left out."""
    envelope = {**answer.envelope, "object": answer.shape.chunk_object}
    opened: set[int] = set()
    told = answer.usage
    async with aclosing(answer.generation.pieces()) as pieces:
        async for index, piece in pieces:
            made = answer.shape.chunks(index, piece)
            opening = [] if index in opened else answer.shape.opening(index)
            opened.add(index)
            first = answer.report.add_to_events(index, [*opening, *made], piece)
            usage = answer.usage if continuous_usage else None
            # What stands before a choice's first piece has taken no token of it.
            before = None if usage is None else usage | {k: told[k] for k in _COUNTED}
            for choices, so_far in ((opening, before), (made, usage)):
                shown = {"usage": so_far} if include_usage else {}
                for choice in choices:
                    yield event({**envelope, **first, "choices": [choice], **shown})
                    first = {}
            told = told if usage is None else usage
    if include_usage:
        yield event({**envelope, "choices": [], "usage": answer.usage})
    await answer.generation.account.settled()
    yield DONE


async def respond(request: Request, body: GenerationRequest, answer: Answer) -> Response:
    """The response, whole or streamed; a client that disconnects cancels what still runs."""
    try:
        if body.stream:
            events = streamed(answer, body.include_usage, body.continuous_usage)
            return await event_stream(request, events, answer.headers)
        content = json.dumps(await unless_gone(request, whole(answer)), ensure_ascii=False)
    except BaseException:
        answer.generation.close()
        raise
    return Response(content, media_type="application/json", headers=answer.headers)


def envelope_of(services: Services, generation: Generation) -> Json:
    opened = generation.account.opened
    envelope: Json = {
        "id": opened.request_id,
        "created": int(opened.at),
        "model": opened.model,
        "system_fingerprint": services.fingerprint,
    }
    if opened.assignment is not None:
        envelope["quickchange"] = request_selection.shown(opened.assignment)
    return envelope
