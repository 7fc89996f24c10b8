"""Anthropic's routes for messages: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from quickchange_server.api.anthropic.message_errors import failure
from quickchange_server.api.anthropic.message_requests import CountRequest, MessageRequest
from quickchange_server.api.anthropic.message_responses import MessageAnswer, MessageWriter
from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_route import begin_chat, chat_prompt
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openai.models import ANTHROPIC_VERSION
from quickchange_server.api.openapi.message_models import (
    MessageErrorBody,
    MessageEvent,
    MessageObject,
    TokenCount,
)
from quickchange_server.api.openapi.route_responses import events, message_errors
from quickchange_server.api.sse import event_stream, named_event, unless_gone
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.request_base import Json

router = APIRouter(
    route_class=JsonRoute,
    tags=["Anthropic"],
    responses=message_errors(400, 401, 403, 404, 413, 500, 503, 507),
)


@router.post(
    "/v1/messages",
    response_model=MessageObject,
    responses=message_errors(424, 429) | events(MessageEvent | MessageErrorBody),
)
async def messages(
    request: Request, body: MessageRequest, services: Injected, caller: Calling
) -> Response:
    """Answer a conversation."""
    request_id = f"msg_{uuid.uuid4().hex}"
    chat = await begin_chat(services, caller, body.chat, request.headers, request_id=request_id)
    shown = body.thinking is None or body.thinking.display != "omitted"
    answer = MessageAnswer(chat, MessageWriter(show_thinking=shown), body.marks_cache)
    try:
        if body.stream:
            written = _written(answer)
            return await event_stream(request, written, answer.headers, failure, named_event)
        content = json.dumps(await unless_gone(request, answer.whole()), ensure_ascii=False)
    except BaseException:
        chat.generation.close()
        raise
    return Response(content, media_type="application/json", headers=answer.headers)


async def _written(answer: MessageAnswer) -> AsyncGenerator[bytes, None]:
    async with aclosing(answer.events()) as told:
        async for event in told:
            yield named_event(event)


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(
    request: Request, body: CountRequest, services: Injected, caller: Calling
) -> Json:
    """Count the tokens of a conversation's prompt."""
    order = await request_selection.select(services, caller, body.chat, request.headers)
    services = await request_selection.speaking(services, order)
    chat = order.body
    tools_form(services.text, chat.messages, chat.offered_tools)
    most = CONTEXTS * services.engine.max_model_len
    prompt = await chat_prompt(services, chat, most=most, param="messages")
    return {"input_tokens": len(prompt)}


_PATHS = frozenset(route.path for route in router.routes if isinstance(route, APIRoute))


def is_anthropics(request: Request) -> bool:
    """True for a request of Anthropic's API: on its routes, or by one of its clients."""
    return request.scope["path"] in _PATHS or ANTHROPIC_VERSION in request.headers
