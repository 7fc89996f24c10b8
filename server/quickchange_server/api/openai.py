"""OpenAI's generation routes: /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from quickchange_server.api import ordering
from quickchange_server.api.schemas import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    Sampled,
)
from quickchange_server.api.shapes import (
    ChatShape,
    CompletionShape,
    Json,
    Shape,
    predictions,
    usage,
)
from quickchange_server.api.sse import DONE, event, event_stream, unless_gone
from quickchange_server.choices import Choices
from quickchange_server.services import Injected, Services
from quickchange_server.transcript import Ending, LoggedToken

router = APIRouter(tags=["OpenAI"])


@dataclass(frozen=True)
class Answer:
    """A request under way, and how its route writes the answer."""

    envelope: Json  # what the whole answer and each event have in common, "object" aside
    shape: Shape
    choices: Choices
    prompt_tokens: int  # of all prompts
    choices_per_prompt: int
    drafting: bool  # tokens are drafted ahead

    @property
    def usage(self) -> Json:
        cached = sum(
            self.choices[index].cached_tokens
            for index in range(0, len(self.choices), self.choices_per_prompt)
        )
        told = usage(self.prompt_tokens, self.choices.completion_tokens, cached)
        if self.drafting:
            told |= predictions(self.choices.drafted_tokens, self.choices.accepted_tokens)
        return told


@dataclass
class _Collected:
    """One choice of an answer that is not streamed."""

    parts: list[str] = field(default_factory=list)
    tokens: list[LoggedToken] = field(default_factory=list)
    ending: Ending | None = None


async def whole(answer: Answer) -> Json:
    """The answer in one piece."""
    collected = [_Collected() for _ in range(len(answer.choices))]
    async with aclosing(answer.choices.pieces()) as pieces:
        async for index, piece in pieces:
            choice = collected[index]
            choice.parts.append(piece.text)
            choice.tokens.extend(piece.tokens)
            choice.ending = piece.ending
    return {
        **answer.envelope,
        "object": answer.shape.object,
        "choices": [
            answer.shape.choice(index, "".join(choice.parts), choice.tokens, choice.ending)
            for index, choice in enumerate(collected)
        ],
        "usage": answer.usage,
    }


async def streamed(answer: Answer, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    envelope = {**answer.envelope, "object": answer.shape.chunk_object}
    without_usage = {"usage": None} if include_usage else {}
    opened: set[int] = set()
    async with aclosing(answer.choices.pieces()) as pieces:
        async for index, piece in pieces:
            said = [answer.shape.chunk(index, piece)]
            if index not in opened:
                opened.add(index)
                opening = answer.shape.opening(index)
                said = said if opening is None else [opening, *said]
            for choice in said:
                yield event({**envelope, "choices": [choice], **without_usage})
    if include_usage:
        yield event({**envelope, "choices": [], "usage": answer.usage})
    yield DONE


async def respond(request: Request, body: Sampled, answer: Answer) -> Response:
    """The response; a client that goes away before its end cancels what still runs."""
    try:
        if body.stream:
            return await event_stream(request, streamed(answer, body.include_usage))
        content = json.dumps(await unless_gone(request, whole(answer)), ensure_ascii=False)
    except BaseException:
        await answer.choices.close()
        raise
    return Response(content, media_type="application/json")


def _envelope(services: Services, request_id: str, model: str) -> Json:
    return {
        "id": request_id,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": services.fingerprint,
    }


async def _prompts(
    services: Services, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """The prompts' token ids; text as the tokenizer encodes it, with its own special tokens."""
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    encoded = []
    for one in several:
        if isinstance(one, str):
            encoded.append(await services.text.encode(one))
        else:
            assert isinstance(one, list)
            services.text.check_ids(one, "prompt")
            encoded.append(one)
    return encoded


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest, services: Injected) -> Response:
    """Continue a prompt."""
    selection = ordering.select(services, body)
    prompts = await _prompts(services, body.prompt)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    choices = await ordering.admit(
        services,
        body,
        selection,
        prompts,
        request_id=request_id,
        prompt_param="prompt",
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )
    shape = CompletionShape(services.text, body.logprobs is not None)
    envelope = _envelope(services, request_id, selection.model)
    drafting = selection.drafting is not None
    answer = Answer(envelope, shape, choices, sum(map(len, prompts)), body.n, drafting)
    return await respond(request, body, answer)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest, services: Injected) -> Response:
    """Answer a chat."""
    selection = ordering.select(services, body)
    messages = [message.for_template() for message in body.messages]
    prompt = await services.text.encode_chat(messages)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    choices = await ordering.admit(
        services,
        body,
        selection,
        [prompt],
        request_id=request_id,
        prompt_param="messages",
        default_tokens=None,
    )
    shape = ChatShape(services.text, body.logprobs)
    envelope = _envelope(services, request_id, selection.model)
    drafting = selection.drafting is not None
    answer = Answer(envelope, shape, choices, len(prompt), body.n, drafting)
    return await respond(request, body, answer)
