"""Routes that score pairs of texts: vLLM's /score, and /rerank in Jina's and Cohere's shape.

By a classification head of one class, which reads both texts as the tokenizer joins them, where the
adapter has one; else by the cosine of the two texts' vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_pooling import RankedList, ScoreList
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, GENERATION_ERRORS
from quickchange_server.api.pooling.pooled_run import Pooled, PoolingCall, call, classes, pooled
from quickchange_server.api.pooling.prompt_cut import apart, first_tokens, text_ids
from quickchange_server.api.pooling.scoring_requests import (
    LIMITS,
    PairsRequest,
    RerankRequest,
    ScoreRequest,
)
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.embedding import Floats
from quickchange_server.frontend.request_base import Json

router = APIRouter(route_class=JsonRoute, tags=["vLLM"], responses=COMMON_ERRORS)


@router.post("/v1/score", response_model=ScoreList, responses=GENERATION_ERRORS)
@router.post("/score", response_model=ScoreList, responses=GENERATION_ERRORS)
async def score(
    request: Request, body: ScoreRequest, services: Injected, caller: Calling
) -> Response:
    """Score pairs of texts."""
    made = await call(request, services, caller, body)
    found, scores = await _scored(made, body, body.texts, names=body.names, kind="score")
    return found.listed(
        [{"object": "score", "index": index, "score": one} for index, one in enumerate(scores)]
    )


@router.post("/v2/rerank", response_model=RankedList, responses=GENERATION_ERRORS)
@router.post("/v1/rerank", response_model=RankedList, responses=GENERATION_ERRORS)
@router.post("/rerank", response_model=RankedList, responses=GENERATION_ERRORS)
async def rerank(
    request: Request, body: RerankRequest, services: Injected, caller: Calling
) -> Response:
    """Sort documents by how well they fit a query, the best first."""
    made = await call(request, services, caller, body)
    texts = ([body.query], body.documents)
    found, scores = await _scored(made, body, texts, names=("query", "documents"), kind="rerank")
    order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
    results: list[Json] = []
    for index in order[: body.top_n or None]:
        told: Json = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            told["document"] = {"text": body.documents[index]}
        results.append(told)
    return found.answer({"results": results})


async def _scored(
    made: PoolingCall,
    body: PairsRequest,
    texts: tuple[Sequence[str], Sequence[str]],
    *,
    names: tuple[str, str],
    kind: str,
) -> tuple[Pooled, list[float]]:
    """A score of each pair; a single first text is paired with all of the second ones."""
    first, second = [
        await _shortened(made, some, getattr(body, limit), limit, param)
        for some, limit, param in zip(texts, LIMITS, names, strict=True)
    ]
    if made.order.selection.classifiers:
        return await _by_head(made, body, first, second, kind=kind, param=names[1])
    return await _by_cosine(made, first, second, names=names, kind=kind)


async def _shortened(
    made: PoolingCall, texts: Sequence[str], limit: int, name: str, param: str
) -> Sequence[str]:
    """The first `limit` tokens of each text; 0: all of it. `name` is the limit's field."""
    if not limit:
        return texts
    most = made.services.engine.max_model_len
    if limit >= most:
        raise InvalidRequestError(
            f"{name}: {limit} must be less than max_model_len, the context's {most} tokens; lower "
            "it, or give 0 for all tokens",
            param=name,
        )
    text = made.services.text
    return [await first_tokens(text, one, limit, most=most, param=param) for one in texts]


async def _by_cosine(
    made: PoolingCall,
    first: Sequence[str],
    second: Sequence[str],
    *,
    names: tuple[str, str],
    kind: str,
) -> tuple[Pooled, list[float]]:
    services = made.services
    most, cut = services.engine.max_model_len, made.cut
    prompts = [
        ids
        for texts, param in zip((first, second), names, strict=True)
        for ids in await text_ids(services.text, texts, cut, most=most, param=param, special=True)
    ]
    found = await pooled(made, prompts, kind=kind, param=names[1], pooling="last")
    left, right = found.states[: len(first)], found.states[len(first) :]
    return found, cosines(left, right)


def cosines(left: Floats, right: Floats) -> list[float]:
    """Cosine of each row of `left` [n or 1, H] with that of `right` [n, H]; 0 for a zero row."""
    products = (left.astype(np.float64) * right.astype(np.float64)).sum(axis=1)
    lengths = [np.linalg.norm(side.astype(np.float64), axis=1) for side in (left, right)]
    whole = lengths[0] * lengths[1]
    found: list[float] = np.divide(
        products, whole, out=np.zeros_like(products), where=whole != 0
    ).tolist()
    return found


async def _by_head(
    made: PoolingCall,
    body: PairsRequest,
    first: Sequence[str],
    second: Sequence[str],
    *,
    kind: str,
    param: str,
) -> tuple[Pooled, list[float]]:
    services = made.services
    head = await services.catalog.classifier(made.order.selection)
    if head.classes != 1:
        raise InvalidRequestError(
            f"model: {made.order.model!r} tells {head.classes} classes, and a score takes a "
            "classification head of one; use /classify, or another adapter",
            param="model",
        )
    most, cut = services.engine.max_model_len, made.cut
    ones = [*first] * (len(second) if len(first) == 1 else 1)
    pairs = zip(ones, second, strict=True)
    prompts = []
    for one, other in pairs:
        for text in (one, other):
            services.text.check_length(text, most, param)
        encode = partial(services.text.encode_now, one, second=other)
        prompts.append(cut.of(await apart(len(one) + len(other), encode)))
    found = await pooled(made, prompts, kind=kind, param=param, pooling="last")
    told = classes(head, found.states, activation=body.use_activation is not False)
    return found, [one for [one] in told]
