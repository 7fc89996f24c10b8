"""vLLM's routes /pooling and /classify: vectors, and classes by a classification head."""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.lorax.errors import refusal
from quickchange_server.api.openai.requests import wrong
from quickchange_server.api.openapi.response_models_pooling import ClassifiedList, PooledList
from quickchange_server.api.openapi.route_responses import (
    COMMON_ERRORS,
    GENERATION_ERRORS,
    OCTETS,
    lorax_errors,
)
from quickchange_server.api.pooling.embeddings import answered, embedded
from quickchange_server.api.pooling.pooled_run import (
    Pooled,
    PoolingCall,
    call,
    classes,
    pooled,
    prompts_of,
)
from quickchange_server.api.pooling.pooling_requests import (
    ClassifyRequest,
    PoolingRequest,
    TextRequest,
)
from quickchange_server.errors import UnsupportedParameterError
from quickchange_store.canonical.classifier_part import ClassifierHead

router = APIRouter(route_class=JsonRoute, tags=["vLLM"], responses=COMMON_ERRORS)


@router.post("/pooling", response_model=PooledList, responses=GENERATION_ERRORS | OCTETS)
async def pooling(
    request: Request, body: PoolingRequest, services: Injected, caller: Calling
) -> Response:
    """Turn texts into vectors, or into probabilities of classes."""
    made = await call(request, services, caller, body)
    task = body.task or ("classify" if made.order.selection.classifiers else "embed")
    if task == "embed":
        found, vectors = await embedded(made, body, kind="pooling")
    else:
        _check_classifies(body)
        found, _, told = await _classified(made, body, kind="pooling")
        vectors = [np.array(one, "<f4") for one in told]
    return answered(found, body, vectors, object_="pooling", field="data")


def _check_classifies(body: PoolingRequest) -> None:
    for name in ("dimensions", "pooling", "normalize"):
        if getattr(body, name) != PoolingRequest.model_fields[name].default:
            raise wrong(name, "belongs to the task embed; remove it")


@router.post(
    "/classify", response_model=ClassifiedList, responses=GENERATION_ERRORS | lorax_errors(422)
)
async def classify(
    request: Request, body: ClassifyRequest, services: Injected, caller: Calling
) -> Response:
    """Tell the class of each text, by the classification head of the adapter that `model` names."""
    if body.inputs is not None:
        return refusal(
            request,
            UnsupportedParameterError(
                "/classify: inputs asks for the entities of a text, which takes a token "
                "classification model; for the class of a text send model, an adapter with a "
                "classification head, and input"
            ),
        )
    made = await call(request, services, caller, body)
    found, head, told = await _classified(made, body, kind="classify")
    return found.listed(
        [
            {
                "index": index,
                "label": head.labels[int(np.argmax(probabilities))],
                "probs": probabilities,
                "num_classes": head.classes,
            }
            for index, probabilities in enumerate(told)
        ]
    )


async def _classified(
    made: PoolingCall, body: TextRequest, *, kind: str
) -> tuple[Pooled, ClassifierHead, list[list[float]]]:
    """What the head of the adapter says of each prompt."""
    head = await made.services.catalog.classifier(made.order.selection)
    prompts = await prompts_of(made, body)
    param = "input" if body.messages is None else "messages"
    found = await pooled(made, prompts, kind=kind, param=param, pooling="last")
    return found, head, classes(head, found.states, activation=body.use_activation is not False)
