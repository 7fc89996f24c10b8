"""Routes of LoRAX and TGI that read texts and generate none: /embed, /chat_tokenize."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import INFER, Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.lorax import translation
from quickchange_server.api.lorax.requests import EmbedRequest
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_requests import ChatRequest, chat_length
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openapi.response_models import LoraxErrorBody, TokenizedChat
from quickchange_server.api.openapi.response_models_pooling import LoraxEmbedding
from quickchange_server.api.openapi.route_responses import lorax_errors
from quickchange_server.api.pooling.pooled_run import PoolingCall, pooled
from quickchange_server.api.pooling.pooling_requests import PooledRequest
from quickchange_server.errors import UnsupportedParameterError
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.embedding import unit
from quickchange_server.frontend.request_base import Json

router = APIRouter(route_class=JsonRoute, tags=["LoRAX"], responses=lorax_errors(401, 403, 422))

_ERRORS = lorax_errors(413, 424, 429, 500, 503)


@router.post("/embed", response_model=LoraxEmbedding, responses=_ERRORS)
async def embed(
    request: Request, body: EmbedRequest, services: Injected, caller: Calling
) -> Response:
    """Turn a text into a vector, the one that /v1/embeddings gives."""
    given = body.parameters
    fields = PooledRequest.model_validate(translation.chosen(services, given))
    wanted = fields.as_completion(services.catalog.base_name)
    order = await translation.selected(services, caller, request.headers, given, wanted)
    services = await request_selection.speaking(services, order)
    most = services.engine.max_model_len
    prompt = await services.text.encode(body.inputs, most=most, param="inputs")
    call = PoolingCall(services, request, fields, order)
    found = await pooled(call, [prompt], kind="embd", param="inputs", pooling="last")
    return found.bare({"embeddings": unit(found.vectors[0]).tolist()})


@router.post("/chat_tokenize", response_model=TokenizedChat, responses=_ERRORS)
async def chat_tokenize(
    request: Request, body: ChatRequest, services: Injected, caller: Calling
) -> Json:
    """Text and tokens of a chat's prompt, in TGI's form."""
    order = await request_selection.select(services, caller, body, request.headers)
    services = await request_selection.speaking(services, order)
    chat = order.body
    tools_form(services.text, chat.messages, chat.offered_tools)
    most = CONTEXTS * services.engine.max_model_len
    text = await services.text.chat_text(
        lambda: [message.for_template() for message in chat.messages],
        chat_length(chat.messages, chat.offered_tools) + chat.rendered_length,
        most=most,
        param="messages",
        tools=lambda: [tool.for_template() for tool in chat.offered_tools],
        how=chat.how,
    )
    spans = await services.text.spans(
        text, most=most, param="messages", add_special_tokens=chat.add_special_tokens
    )
    tokens = [
        {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}
        for token_id, start, stop in spans
    ]
    return {"tokenize_response": tokens, "templated_text": text}


@router.post(
    "/classify_batch", dependencies=[Depends(INFER)], status_code=422, response_model=LoraxErrorBody
)
async def classify_batch() -> Response:
    """Refuse the request, as LoRAX does unless the model is a classification model."""
    raise UnsupportedParameterError(
        "/classify_batch: the entities of texts take a token classification model; for the class "
        "of a text POST /classify with model, an adapter with a classification head, and input"
    )
