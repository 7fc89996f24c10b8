"""OpenAI's route for embeddings, /v1/embeddings: pooled hidden states, with any adapter."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.completions import token_ids
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.api.openapi.response_models import EmbeddingList
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, GENERATION_ERRORS
from quickchange_server.api.sse import unless_gone
from quickchange_server.errors import EngineFailedError
from quickchange_server.frontend.embedding import Floats, unit, vector
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.request_base import (
    Adapters,
    Body,
    Json,
    Name,
    Prompt,
    Unsupported,
)
from quickchange_server.protocol import Pooling

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "dimensions": Unsupported(
            "the model was not trained to be cut: embeddings have its hidden size; remove it"
        ),
        "truncate_prompt_tokens": Unsupported("shorten the input; /tokenize counts its tokens"),
        "priority": Unsupported("requests are served fairly over adapters; remove it", (0,)),
        "add_special_tokens": Unsupported("give the input as token ids (/tokenize)", (True,)),
    }

    model: Name
    input: Prompt
    adapters: Adapters = Field(default=[])
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "last"
    normalize: bool = True
    user: str | None = None

    def as_completion(self) -> CompletionRequest:
        """A completion body with the same model, adapters and user, to select what serves it."""
        return CompletionRequest(
            model=self.model,
            prompt="",  # the input is checked already, and selects nothing
            adapters=self.adapters,
            turbo="off",  # nothing is drafted
            user=self.user,
        )


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=GENERATION_ERRORS)
async def embeddings(
    request: Request, body: EmbeddingRequest, services: Injected, caller: Calling
) -> Response:
    """Turn texts into vectors."""
    order = request_selection.select(services, caller, body.as_completion(), request.headers)
    generation = await request_selection.admit(
        services,
        order,
        await token_ids(services, body.input, "input"),
        request_id=f"embd-{uuid.uuid4().hex}",
        prompt_param="input",
        default_tokens=None,
        pooling=body.pooling,
    )
    try:
        vectors = await unless_gone(request, _vectors(generation))
        await generation.account.settled()
    except BaseException:
        generation.close()
        raise
    opened = generation.account.opened
    answer: Json = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(unit(v) if body.normalize else v, body.encoding_format),
            }
            for index, v in enumerate(vectors)
        ],
        "model": opened.model,
        "usage": {"prompt_tokens": opened.prompt_tokens, "total_tokens": opened.prompt_tokens},
    }
    if opened.assignment is not None:
        answer["quickchange"] = request_selection.shown(opened.assignment)
    return Response(
        json.dumps(answer),
        media_type="application/json",
        headers=request_selection.headers(opened.assignment),
    )


async def _vectors(generation: Generation) -> Sequence[Floats]:
    """One hidden state [H] per input."""
    async for _ in generation.pieces():
        pass
    vectors = []
    for choice in generation.choices:
        if choice.embedding is None:
            raise EngineFailedError("the engine ended an embedding without a vector; try again")
        vectors.append(vector(choice.embedding))
    return vectors


def _encoded(vector: Floats, how: Literal["float", "base64"]) -> list[float] | str:
    if how == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
