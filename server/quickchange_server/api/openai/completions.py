"""OpenAI's generation routes: /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.requests import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    chat_length,
)
from quickchange_server.api.openai.responses import (
    ChatShape,
    CompletionShape,
    PromptReport,
    PromptShape,
    Shape,
    ToolChatShape,
    predictions,
    prompt_report,
    usage,
)
from quickchange_server.api.openai.tool_calling import with_tools
from quickchange_server.api.openapi.response_models import (
    ChatCompletion,
    ChatCompletionChunk,
    CompletionChunk,
    ErrorBody,
    TextCompletion,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, GENERATION_ERRORS, events
from quickchange_server.api.sse import DONE, event, event_stream, unless_gone
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.output_processor import Ending, LoggedToken
from quickchange_server.frontend.request_base import Json

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)

AnyPrompt = str | list[str] | list[int] | list[list[int]]


@dataclass(frozen=True)
class Answer:
    """A request under way, and the shape of its answer."""

    envelope: Json  # fields that the whole answer and each event share, without "object"
    shape: Shape
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
        return counts


@dataclass
class _Collected:
    """One choice of an answer that is not streamed."""

    parts: list[str] = field(default_factory=list)
    tokens: list[LoggedToken] = field(default_factory=list)
    ending: Ending | None = None

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
            choice.ending = piece.ending
    await answer.generation.account.settled()
    return {
        **answer.envelope,
        "object": answer.shape.object,
        "choices": [
            answer.shape.choice(index, "".join(choice.parts), choice.tokens, choice.ending)
            for index, choice in enumerate(_best(collected, answer))
        ],
        "usage": answer.usage,
    }


async def streamed(
    answer: Answer, include_usage: bool, continuous_usage: bool = False
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; pieces that tell nothing are left out."""
    envelope = {**answer.envelope, "object": answer.shape.chunk_object}
    opened: set[int] = set()
    async with aclosing(answer.generation.pieces()) as pieces:
        async for index, piece in pieces:
            choices = answer.shape.chunks(index, piece)
            if index not in opened:
                opened.add(index)
                choices = [*answer.shape.opening(index), *choices]
            usage = {"usage": answer.usage if continuous_usage else None} if include_usage else {}
            for choice in choices:
                yield event({**envelope, "choices": [choice], **usage})
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


def _envelope(services: Services, generation: Generation) -> Json:
    opened = generation.account.opened
    envelope = {
        "id": opened.request_id,
        "created": int(opened.at),
        "model": opened.model,
        "system_fingerprint": services.fingerprint,
    }
    if opened.assignment is not None:
        envelope["quickchange"] = request_selection.shown(opened.assignment)
    return envelope


def _several(prompt: AnyPrompt) -> Sequence[str | list[int]]:
    """The list of prompts, each text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return cast("list[list[int]]", [prompt])
    return cast("list[str | list[int]]", prompt)


async def token_ids(services: Services, prompt: AnyPrompt, param: str) -> list[list[int]]:
    """The prompts' token ids; text is encoded with the tokenizer's own special tokens."""
    several, most = _several(prompt), services.engine.max_model_len
    if isinstance(several[0], str):
        return await services.text.encode_each(cast("Sequence[str]", several), most, param)
    given = cast("list[list[int]]", several)
    for ids in given:
        services.text.check_ids(ids, param)
    return given


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses=GENERATION_ERRORS | events(CompletionChunk | ErrorBody, last="[DONE]"),
)
async def completions(
    request: Request, body: CompletionRequest, services: Injected, caller: Calling
) -> Response:
    """Continue a prompt."""
    order = request_selection.select(services, caller, body, request.headers)
    body = order.body
    prompts = await token_ids(services, body.prompt, "prompt")
    generation = await request_selection.admit(
        services,
        order,
        prompts,
        request_id=f"cmpl-{uuid.uuid4().hex}",
        prompt_param="prompt",
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )
    shape = CompletionShape(services.text, body.logprobs is not None)
    if body.echo or body.prompt_logprobs is not None:
        repeated = _repeated(services, body, prompts)
        shape = PromptShape(services.text, body, repeated, generation.choices)
    drafting = order.selection.drafting is not None
    envelope = _envelope(services, generation)
    answer = Answer(envelope, shape, generation, drafting, body.n, body.candidates)
    return await respond(request, body, answer)


def _repeated(
    services: Services, body: CompletionRequest, prompts: Sequence[Sequence[int]]
) -> list[PromptReport]:
    return [
        prompt_report(services.text, sent if isinstance(sent, str) else None, ids)
        for sent, ids in zip(_several(body.prompt), prompts, strict=True)
    ]


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=GENERATION_ERRORS | events(ChatCompletionChunk | ErrorBody, last="[DONE]"),
)
async def chat_completions(
    request: Request, body: ChatRequest, services: Injected, caller: Calling
) -> Response:
    """Answer a chat."""
    order = request_selection.select(services, caller, body, request.headers)
    if body.tools:  # the checks of their schemas may take long
        order, calls = await asyncio.to_thread(with_tools, services.text, order)
    else:
        order, calls = with_tools(services.text, order)
    body = order.body
    prompt = await services.text.encode_chat(
        lambda: [message.for_template() for message in body.messages],
        chat_length(body.messages, body.offered_tools),
        most=services.engine.max_model_len,
        param="messages",
        tools=lambda: [tool.for_template() for tool in body.offered_tools],
    )
    generation = await request_selection.admit(
        services,
        order,
        [prompt],
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt_param="messages",
        default_tokens=None,
    )
    shape = ChatShape(services.text, body.logprobs)
    if calls is not None:
        most = None if body.parallel_tool_calls else 1
        shape = ToolChatShape(services.text, body.logprobs, calls.reader, most=most)
    drafting = order.selection.drafting is not None
    answer = Answer(_envelope(services, generation), shape, generation, drafting)
    return await respond(request, body, answer)
