"""Routes that SageMaker calls in a container: /invocations for every kind of body, /adapters.

An invocation is answered by the route that the body's own API has for it, with that route's checks,
answers and errors. Which one follows from the body's fields, as in vLLM.
"""

from __future__ import annotations

import json

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from starlette.types import Message, Receive, Scope, Send

from quickchange_server.api.admin.adapters import adapters_on
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import MANAGE, Calling, Managing
from quickchange_server.api.json_bodies import JsonRoute, parse_large
from quickchange_server.api.openapi.response_models import (
    ChatCompletion,
    LoraxGeneration,
    TextCompletion,
)
from quickchange_server.api.openapi.response_models_pooling import (
    ClassifiedList,
    EmbeddingList,
    PooledList,
)
from quickchange_server.api.openapi.route_responses import (
    COMMON_ERRORS,
    GENERATION_ERRORS,
    PLAIN_TEXT,
    errors,
)
from quickchange_server.api.vllm.routes import LoadLora, load_named, unload_named
from quickchange_server.errors import InvalidRequestError, QuickchangeError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import MAX_PATH, Body, Json, Name

router = APIRouter(route_class=JsonRoute, tags=["SageMaker"], responses=COMMON_ERRORS)

ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"  # stands for the field `model`

# The field that tells whose body it is, and its route. The first that is there counts.
TARGETS = {
    "messages": "/v1/chat/completions",
    "prompt": "/v1/completions",
    "query": "/rerank",
    "queries": "/score",
    "text_1": "/score",
    "input": "/v1/embeddings",
    "inputs": "/",
}
_POOLED = ("messages", "input")  # may also belong to /pooling and /classify


class _Forwarded(Response):
    """The response of another route to the same request, which has been read."""

    def __init__(self, path: str, body: bytes) -> None:
        super().__init__()
        self._path = path
        self._content = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = [self._content]

        async def received() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(self._content)).encode()))
        path = {"path": self._path, "raw_path": self._path.encode(), "headers": headers}
        await scope["app"].router({**scope, **path}, received, send)


@router.post(
    "/invocations",
    response_model=TextCompletion
    | ChatCompletion
    | EmbeddingList
    | ClassifiedList
    | PooledList
    | list[LoraxGeneration],
    responses=GENERATION_ERRORS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [{"type": "object", "required": [f]} for f in TARGETS]}
                }
            },
        }
    },
)
async def invocations(request: Request, services: Injected, caller: Calling) -> Response:
    """Answer as the route does whose body this is: `messages`, `prompt`, `input` or `inputs`."""
    content = await request.body()
    try:
        body = await parse_large(content)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is no JSON: {error}") from error
    known = body if isinstance(body, dict) else {}
    adapter = request.headers.get(ADAPTER_HEADER)
    path, content = _target(known, content, adapter)
    if any(path == TARGETS[field] for field in _POOLED):
        if "task" in known:
            path = "/pooling"
        elif _classifies(services, caller, adapter or known.get("model")):
            path = "/classify"
    return _Forwarded(path, content)


def _classifies(services: Services, caller: Caller, model: object) -> bool:
    """True if the model is an adapter with a classification head."""
    if not isinstance(model, str) or not model:
        return False
    try:
        return bool(services.catalog.select(model, sees=caller.sees).classifiers)
    except QuickchangeError:
        return False  # the route that answers says what is wrong with it


def _target(known: Json, content: bytes, adapter: str | None) -> tuple[str, bytes]:
    """The path that answers the body, and the body for it."""
    field = next((field for field in TARGETS if field in known), None)
    if field is None:
        raise InvalidRequestError(
            "the body is none that is served here: give messages (a chat), prompt (a completion), "
            "query (a ranking), queries (scores), input (embeddings) or inputs (LoRAX's and TGI's)"
        )
    if adapter is not None:
        if field == "inputs":
            parameters = known.get("parameters")
            given = parameters if isinstance(parameters, dict) else {}
            known = {**known, "parameters": {**given, "adapter_id": adapter}}
        else:
            known = {**known, "model": adapter}
        content = json.dumps(known).encode()
    return TARGETS[field], content


class SageMakerAdapter(Body):
    """Body of POST /adapters."""

    name: Name = Field(min_length=1)
    src: str = Field(min_length=1, max_length=MAX_PATH)


@router.post(
    "/adapters",
    dependencies=[Depends(MANAGE), Depends(adapters_on)],
    response_class=Response,
    responses=PLAIN_TEXT | errors(404, 409, 413),
)
async def load_adapter(body: SageMakerAdapter, services: Injected, caller: Managing) -> Response:
    """Import an adapter from a folder, as /v1/load_lora_adapter does."""
    return await load_named(services, caller, LoadLora(lora_name=body.name, lora_path=body.src))


@router.delete(
    "/adapters/{adapter_name}",
    dependencies=[Depends(MANAGE), Depends(adapters_on)],
    response_class=Response,
    responses=PLAIN_TEXT | errors(404, 409, 413),
)
async def unload_adapter(adapter_name: str, services: Injected, caller: Managing) -> Response:
    """Remove an adapter's name with all its versions, as /v1/unload_lora_adapter does."""
    return await unload_named(services, caller, adapter_name)
