"""OpenAI's routes for responses, /v1/responses: create, retrieve, cancel, delete, list inputs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_route import Chat, begin_chat
from quickchange_server.api.openapi.response_models_responses import (
    DeletedResponse,
    GivenItems,
    OpenAIResponse,
    ResponseStreamEvent,
)
from quickchange_server.api.openapi.route_responses import (
    COMMON_ERRORS,
    GENERATION_ERRORS,
    errors,
    events,
)
from quickchange_server.api.responses.chat_translation import Translated, chat_of, translated
from quickchange_server.api.responses.response_answering import Keeping, ResponseWork
from quickchange_server.api.responses.response_context import SWITCH, context_of, owner_of
from quickchange_server.api.responses.response_events import OutputWriter
from quickchange_server.api.responses.response_objects import ResponseObject
from quickchange_server.api.responses.response_requests import ResponseRequest
from quickchange_server.api.sse import event_stream, unless_gone
from quickchange_server.errors import (
    ContextLengthError,
    ForbiddenError,
    InvalidRequestError,
    QuickchangeError,
    UnsupportedParameterError,
)
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Json
from quickchange_server.storage.responses.stored_responses import StoredResponses, unknown

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)

LISTED = 20  # items of a page
MOST_LISTED = 100


@router.post(
    "/v1/responses",
    response_model=OpenAIResponse,
    responses=GENERATION_ERRORS | events(ResponseStreamEvent),
)
async def create_response(
    request: Request, body: ResponseRequest, services: Injected, caller: Calling
) -> Response:
    """Answer an input: a text, or a conversation's items."""
    response_id = f"resp_{uuid.uuid4().hex}"
    owner = owner_of(caller)
    context = await context_of(services.responses, owner, body)
    made = translated(body, context)
    chat = await _begin(services, caller, body, made, request.headers, response_id)
    store = services.responses if body.store else None
    work = ResponseWork(
        ResponseObject(body, chat, store is not None),
        OutputWriter(
            response_id,
            chat.text,
            chat.reader(),
            logprobs=body.wanted_logprobs is not None,
            reasoning=body.include_reasoning,
        ),
        None if store is None else Keeping(store, owner, context),
    )
    headers = request_selection.headers(chat.generation.account.opened.assignment)
    try:
        if body.stream:
            return await event_stream(request, work.events(), headers, work.failure)
        content = json.dumps(await unless_gone(request, work.whole()), ensure_ascii=False)
    except BaseException:
        chat.generation.close()
        raise
    return Response(content, media_type="application/json", headers=headers)


async def _begin(
    services: Services,
    caller: Caller,
    body: ResponseRequest,
    made: Translated,
    headers: Mapping[str, str],
    response_id: str,
) -> Chat:
    """The admitted chat; with `truncation` auto, without as many of its oldest turns as it takes to
    fit. Raises errors that name the client's own fields."""
    turns, most = 0, made.turns - 1 if body.truncation == "auto" else 0
    while True:
        now = made.without(turns)
        chat = chat_of(body, now)
        try:
            return await begin_chat(
                services, caller, chat, headers, request_id=response_id, param="input"
            )
        except ContextLengthError as error:
            if turns >= most:
                raise now.renamed(error) from None
            turns = min(2 * turns or 1, most)
        except QuickchangeError as error:
            raise now.renamed(error) from None


@router.get("/v1/responses/{id}", response_model=OpenAIResponse, responses=errors(404))
async def retrieve_response(
    id: str, services: Injected, caller: Calling, stream: bool = False
) -> Response:
    """A stored response, or one that is being streamed."""
    if stream:
        raise UnsupportedParameterError(
            "stream: events are not kept, the response they led to is; remove it",
            param="stream",
        )
    store, owner = _store(services), owner_of(caller)
    work = store.running(owner, id)
    if work is not None:
        return _json(work.so_far())
    kept = await store.find(owner, id)
    if kept is None:
        raise unknown(id)
    return _json(kept.response)


@router.post("/v1/responses/{id}/cancel", response_model=OpenAIResponse, responses=errors(404))
async def cancel_response(id: str, services: Injected, caller: Calling) -> Response:
    """Cancel a response that this server is streaming."""
    store, owner = _store(services), owner_of(caller)
    work = store.running(owner, id)
    if work is not None:
        return _json(await work.cancel())
    kept = await store.find(owner, id)
    if kept is None:
        raise unknown(id)
    if kept.response["status"] == "cancelled":
        return _json(kept.response)
    raise InvalidRequestError(
        "Cannot cancel a synchronous response. This one has ended: it is "
        f"{kept.response['status']}",
        param="id",
    )


@router.delete("/v1/responses/{id}", response_model=DeletedResponse, responses=errors(404))
async def delete_response(id: str, services: Injected, caller: Calling) -> Json:
    """Delete a stored response."""
    if not await _store(services).forget(owner_of(caller), id):
        raise unknown(id)
    return {"id": id, "object": "response", "deleted": True}


@router.get("/v1/responses/{id}/input_items", response_model=GivenItems, responses=errors(404))
async def list_input_items(
    id: str,
    services: Injected,
    caller: Calling,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = LISTED,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The items that a response answered, those of the responses before it included."""
    turns = await _store(services).conversation(owner_of(caller), id)
    items = [item for turn in turns[:-1] for item in (*turn.input, *turn.response["output"])]
    items += turns[-1].input
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError(f"after: no item has the id {after!r}", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


def _store(services: Services) -> StoredResponses:
    if services.responses is None:
        raise ForbiddenError(
            f"this server keeps no responses: have its operator switch on {SWITCH}"
        )
    return services.responses


def _json(body: Json) -> Response:
    return Response(json.dumps(body, ensure_ascii=False), media_type="application/json")
