"""OpenAI's route for chats, /v1/chat/completions, and what every surface of chats begins with."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.answering import Answer, envelope_of, respond
from quickchange_server.api.openai.chat.chat_requests import ChatRequest, chat_length
from quickchange_server.api.openai.chat.chat_responses import ChatShape
from quickchange_server.api.openai.chat.thoughts import Thoughts
from quickchange_server.api.openai.chat.tool_calling import Calls, with_tools
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.responses import TokenReport
from quickchange_server.api.openapi.response_models import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorBody,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, GENERATION_ERRORS, events
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.parsing.message_reader import MessageReader
from quickchange_server.frontend.tokenizer import Text

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that was admitted, whose answer is to be written."""

    body: ChatRequest  # with the changes of the experiment's variant
    generation: Generation
    drafting: bool  # the usage counts draft tokens
    calls: Calls | None  # None: no tools
    thoughts: Thoughts | None  # None: the model's chat template knows none
    prompt: list[int]  # token ids
    text: Text  # under its adapters

    @property
    def told(self) -> ChatRequest:
        """What the answer tells. Tokens and their log-probabilities would spell thoughts that are
        left out."""
        if self.thoughts is None or self.body.include_reasoning:
            return self.body
        return self.body.model_copy(update={"logprobs": False, "return_token_ids": False})

    def reader(self) -> MessageReader:
        """A new parser for one choice."""
        return MessageReader(
            None if self.calls is None else self.calls.reader(),
            most_calls=None if self.body.parallel_tool_calls else 1,
            thoughts=None if self.thoughts is None else self.thoughts.reader(),
        )


async def begin_chat(
    services: Services,
    caller: Caller,
    body: ChatRequest,
    headers: Mapping[str, str],
    *,
    request_id: str,
    param: str = "messages",
) -> Chat:
    """Select, render and admit a chat. Errors of its messages name `param`.

    Raises what `select`, `with_tools`, `Text.encode_chat` and `admit` raise.
    """
    order = await request_selection.select(services, caller, body, headers)
    services = await request_selection.speaking(services, order)
    form = await services.text.learn_reasoning()
    if body.tools:  # the checks of their schemas may take long
        order, calls = await asyncio.to_thread(with_tools, services.text, order)
    else:
        order, calls = with_tools(services.text, order)
    if form is not None:
        order = replace(order, shown=order.shown | services.text.special_of(form.marks))
    body = order.body
    limit = order.context(services)
    prompt = await chat_prompt(services, body, most=body.most_prompt_tokens(limit), param=param)
    prompt = body.truncated(prompt, limit)
    thoughts = None if form is None else Thoughts.of(services.text, form, body, prompt)
    if thoughts is not None:
        order = await _behind(services, thoughts, order)
    generation = await request_selection.admit(
        services,
        order,
        [prompt],
        request_id=request_id,
        prompt_param=param,
        default_tokens=None,
    )
    drafting = order.selection.drafting is not None
    return Chat(body, generation, drafting, calls, thoughts, prompt, services.text)


async def _behind(
    services: Services, thoughts: Thoughts, order: Order[ChatRequest]
) -> Order[ChatRequest]:
    """The order, and its shadows, with constraints that hold behind the thoughts."""
    demanded = order.demanded or await request_selection.asked_of(order.body)
    shadows = [(a, await _behind(services, thoughts, shadow)) for a, shadow in order.shadows]
    return replace(
        order,
        demanded=None if demanded is None else thoughts.before(services.text, demanded),
        shadows=tuple(shadows),
    )


async def chat_prompt(services: Services, body: ChatRequest, *, most: int, param: str) -> list[int]:
    """The token ids of a chat, `most` at most. Raises what `Text.encode_chat` raises."""
    return await services.text.encode_chat(
        lambda: [message.for_template() for message in body.messages],
        chat_length(body.messages, body.offered_tools) + body.rendered_length,
        most=most,
        param=param,
        tools=lambda: [tool.for_template() for tool in body.offered_tools],
        how=body.how,
        add_special_tokens=body.add_special_tokens,
    )


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=GENERATION_ERRORS | events(ChatCompletionChunk | ErrorBody, last="[DONE]"),
)
async def chat_completions(
    request: Request, body: ChatRequest, services: Injected, caller: Calling
) -> Response:
    """Answer a chat."""
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    chat = await begin_chat(services, caller, body, request.headers, request_id=request_id)
    told = chat.told
    shape = ChatShape(chat.text, told, chat.reader, splits=chat.thoughts is not None)
    report = TokenReport(chat.text, told, [chat.prompt], chat.generation.choices, in_choices=False)
    envelope = envelope_of(services, chat.generation)
    answer = Answer(envelope, shape, report, chat.generation, chat.drafting)
    return await respond(request, told, answer)
