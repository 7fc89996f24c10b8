"""vLLM's routes that render prompts: the token ids that completions and chats would be sent as."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field

from quickchange_server.api.anthropic.message_requests import MessageRequest
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.openai.chat.chat_route import chat_prompt
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openai.completions import several_of, token_ids
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.requests import (
    DEFAULT_COMPLETION_TOKENS,
    CompletionRequest,
    GenerationRequest,
    wrong,
)
from quickchange_server.api.openapi.response_models import RenderedPrompt
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.api.responses.chat_translation import chat_of, translated
from quickchange_server.api.responses.response_context import context_of, owner_of
from quickchange_server.api.responses.response_requests import ResponseRequest
from quickchange_server.frontend.context_length import room
from quickchange_server.frontend.request_base import Body, Json
from quickchange_server.observability.naming import request_ids

router = APIRouter(route_class=JsonRoute, tags=["vLLM"], responses=COMMON_ERRORS)

MAX_ID = 128  # characters, as of the header

Offsets = list[tuple[int, int]]
Bodies = TypeVar("Bodies", bound=GenerationRequest)
Chats = TypeVar("Chats", bound=ChatRequest)


class _Rendering(Body):
    request_id: str | None = Field(None, max_length=MAX_ID)  # unless the header has one
    return_token_offsets: bool = False


class CompletionToRender(_Rendering, CompletionRequest):
    """Body of POST /v1/completions/render."""


class ChatToRender(_Rendering, ChatRequest):
    """Body of POST /v1/chat/completions/render."""


@router.post(
    "/v1/completions/render", response_model=list[RenderedPrompt], responses=errors(404, 413)
)
async def render_completion(
    request: Request, body: CompletionToRender, services: Injected, caller: Calling
) -> list[Json]:
    """Token ids and sampling parameters of each prompt of a completion, which is not generated."""
    order = await request_selection.select(services, caller, body, request.headers)
    services = await request_selection.speaking(services, order)
    body, limit = order.body, services.engine.max_model_len
    most, special = body.most_prompt_tokens(limit), body.add_special_tokens
    sent = await token_ids(services, body.prompt, "prompt", most=most, special=special)
    spans: list[Offsets | None] = [None] * len(sent)
    if body.return_token_offsets:
        texts = several_of(body.prompt)
        spans = [await _offsets(services, text, most, special, "prompt") for text in texts]
    name = _id(request, "cmpl-", body.request_id)
    names = [name] if len(sent) == 1 else [f"{name}-{number}" for number in range(len(sent))]
    return [
        _rendered(services, order, one, ids, offsets, "prompt", DEFAULT_COMPLETION_TOKENS)
        for one, ids, offsets in zip(names, sent, spans, strict=True)
    ]


@router.post(
    "/v1/chat/completions/render", response_model=RenderedPrompt, responses=errors(404, 413)
)
async def render_chat(
    request: Request, body: ChatToRender, services: Injected, caller: Calling
) -> Json:
    """Token ids and sampling parameters of a chat, which is not answered."""
    name = _id(request, "chatcmpl-", body.request_id)
    order = await request_selection.select(services, caller, body, request.headers)
    services = await request_selection.speaking(services, order)
    with_offsets = order.body.return_token_offsets
    return await _chat(services, order, name, "messages", with_offsets=with_offsets)


@router.post("/v1/messages/render", response_model=RenderedPrompt, responses=errors(404, 413))
async def render_messages(
    request: Request, body: MessageRequest, services: Injected, caller: Calling
) -> Json:
    """Token ids and sampling parameters of an Anthropic conversation, which is not answered."""
    order = await request_selection.select(services, caller, body.chat, request.headers)
    services = await request_selection.speaking(services, order)
    return await _chat(services, order, _id(request, "msg_", None), "messages")


@router.post("/v1/responses/render", response_model=RenderedPrompt, responses=errors(404, 413))
async def render_response(
    request: Request, body: ResponseRequest, services: Injected, caller: Calling
) -> Json:
    """Token ids and sampling parameters of a response's input, which is not answered."""
    context = await context_of(services.responses, owner_of(caller), body)
    chat = chat_of(body, translated(body, context))
    order = await request_selection.select(services, caller, chat, request.headers)
    services = await request_selection.speaking(services, order)
    return await _chat(services, order, _id(request, "resp_", None), "input")


async def _chat(
    services: Services,
    order: Order[Chats],
    name: str,
    param: str,
    *,
    with_offsets: bool = False,
) -> Json:
    """A `RenderedPrompt` of a chat."""
    body = order.body
    tools_form(services.text, body.messages, body.offered_tools)
    most = body.most_prompt_tokens(services.engine.max_model_len)
    ids = await chat_prompt(services, body, most=most, param=param)
    offsets = None
    if with_offsets:
        text = await asyncio.to_thread(
            services.text.render_chat,
            [message.for_template() for message in body.messages],
            tools=[tool.for_template() for tool in body.offered_tools],
            how=body.how,
        )
        offsets = await _offsets(services, text, most, body.add_special_tokens, param)
    return _rendered(services, order, name, ids, offsets, param, None)


def _id(request: Request, kind: str, given: str | None) -> str:
    """The client's own id by its header or else its body, or a new one."""
    header = request.headers.get("x-request-id")
    known = header if header and header == request_ids.current() else given
    return f"{kind}{known or uuid.uuid4().hex}"


async def _offsets(
    services: Services, text: str | Sequence[int], most: int, special: bool, param: str
) -> Offsets:
    """Where each token of a text begins and ends, in characters."""
    if not isinstance(text, str):
        raise wrong("return_token_offsets", "token ids have none; send text, or remove it")
    spans = await services.text.spans(text, most=most, param=param, add_special_tokens=special)
    return [(start, stop) for _, start, stop in spans]


def _rendered(
    services: Services,
    order: Order[Bodies],
    request_id: str,
    ids: list[int],
    offsets: Offsets | None,
    param: str,
    default_tokens: int | None,
) -> Json:
    """A `RenderedPrompt`. Raises as the generation's own route where the prompt does not fit."""
    body, limit = order.body, order.context(services)
    ids = body.truncated(ids, limit)
    wanted = body.wanted_tokens
    front = order.selection.virtual_tokens
    left = room(services.engine.max_model_len, len(ids), wanted, param, front)
    most = wanted if wanted is not None else min(left, default_tokens or left)
    if body.min_tokens > most:
        raise wrong(
            "min_tokens", f"{body.min_tokens} exceeds max_tokens, {most} by default; lower it"
        )
    request_selection.check_tokens(services, body)
    sampling = replace(body.sampling_params(), max_tokens=most)
    return {
        "request_id": request_id,
        "token_ids": ids,
        "token_offsets": None if offsets is None else body.truncated(offsets, limit),
        "sampling_params": {name: _plain(value) for name, value in asdict(sampling).items()},
        "model": body.model,
        "stream": body.stream,
        "stream_options": None if body.stream_options is None else body.stream_options.model_dump(),
        "cache_salt": body.cache_salt,
        "priority": 0,
    }


def _plain(value: Any) -> Any:
    """A sampling parameter in JSON."""
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(value)
    return list(value) if isinstance(value, Collection) and not isinstance(value, str) else value
