"""OpenAI's route for embeddings, /v1/embeddings: pooled hidden states, with any adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_pooling import EmbeddingList
from quickchange_server.api.openapi.route_responses import (
    COMMON_ERRORS,
    GENERATION_ERRORS,
    OCTETS,
)
from quickchange_server.api.pooling.pooled_run import Pooled, PoolingCall, call, pooled, prompts_of
from quickchange_server.api.pooling.pooling_requests import EmbeddingRequest
from quickchange_server.api.pooling.vector_encodings import encoded, to_bytes
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.embedding import Floats, unit
from quickchange_server.frontend.request_base import Json

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)

MOST_TOLD = 100  # vectors whose places a header tells


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=GENERATION_ERRORS | OCTETS)
async def embeddings(
    request: Request, body: EmbeddingRequest, services: Injected, caller: Calling
) -> Response:
    """Turn texts into vectors."""
    made = await call(request, services, caller, body)
    found, vectors = await embedded(made, body, kind="embd")
    return answered(found, body, vectors, object_="embedding", field="embedding")


async def embedded(
    made: PoolingCall, body: EmbeddingRequest, *, kind: str
) -> tuple[Pooled, Sequence[Floats]]:
    """The states of a body's prompts, and the vectors that it asks for."""
    _check_dimensions(made.services, body)
    prompts = await prompts_of(made, body)
    _check_bytes(body, len(prompts))
    param = "input" if body.messages is None else "messages"
    found = await pooled(made, prompts, kind=kind, param=param, pooling=body.pooling)
    cut = [state[: body.dimensions] for state in found.vectors]
    return found, [unit(one) for one in cut] if body.normalized else cut


def _check_dimensions(services: Services, body: EmbeddingRequest) -> None:
    most = services.engine.hidden_size
    if body.dimensions is not None and body.dimensions > most:
        raise InvalidRequestError(
            f"dimensions: {body.dimensions} is more than the {most} that the model's vectors have; "
            "give fewer, or remove it",
            param="dimensions",
        )


def _check_bytes(body: EmbeddingRequest, count: int) -> None:
    if body.encoding_format == "bytes" and count > MOST_TOLD:
        raise InvalidRequestError(
            f"encoding_format: bytes tells the place of each vector in a header, of {MOST_TOLD} at "
            'most; ask for "bytes_only" or "base64", or send fewer inputs',
            param="encoding_format",
        )


def answered(
    found: Pooled, body: EmbeddingRequest, vectors: Sequence[Floats], *, object_: str, field: str
) -> Response:
    """The vectors as the body asks for them; `field` holds each in a JSON answer."""
    dtype, order = body.embed_dtype, body.endianness
    if body.encoding_format in ("float", "base64"):
        data: list[Json] = [
            {
                "object": object_,
                "index": index,
                field: encoded(one, body.encoding_format, dtype, order),
            }
            for index, one in enumerate(vectors)
        ]
        return found.listed(data)
    parts = [to_bytes(one, dtype, order) for one in vectors]
    headers = dict(found.headers)
    if body.encoding_format == "bytes":
        headers["metadata"] = json.dumps(_metadata(found, body, vectors, parts))
    return Response(b"".join(parts), media_type="application/octet-stream", headers=headers)


def _metadata(
    found: Pooled, body: EmbeddingRequest, vectors: Sequence[Floats], parts: Sequence[bytes]
) -> Json:
    """vLLM's description of the bytes: where each vector lies."""
    items, begin = [], 0
    for index, (part, one) in enumerate(zip(parts, vectors, strict=True)):
        items.append(
            {
                "index": index,
                "embed_dtype": body.embed_dtype,
                "endianness": body.endianness,
                "start": begin,
                "end": begin + len(part),
                "shape": list(one.shape),
            }
        )
        begin += len(part)
    return {**found.envelope, "created": int(found.opened.at), "data": items}
