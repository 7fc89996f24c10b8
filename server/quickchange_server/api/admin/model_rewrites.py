"""Experiments to and from gateways' InferenceModelRewrite: /v1/model-rewrites."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from quickchange_server.api.admin import experiments
from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Managing
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_experiments import (
    ExportedRewrite,
    ImportedRewrite,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.experiments.exchange.model_rewrite import Rewrite, exported, imported
from quickchange_server.frontend.request_base import Json

router = APIRouter(route_class=JsonRoute, tags=["experiments"], responses=COMMON_ERRORS)

Pool = Annotated[str, Query(min_length=1, max_length=253, pattern=r"^[a-z0-9][a-z0-9.-]*$")]


@router.get("/v1/model-rewrites/{name:path}", response_model=ExportedRewrite, responses=errors(404))
async def export(name: str, services: Injected, caller: Managing, pool: Pool) -> Json:
    """An experiment's present shares as an InferenceModelRewrite of a pool."""
    experiment = experiments.seen(services, caller, name)
    made = exported(experiment, services.experiments.clock(), pool=pool)
    return {
        "object": "experiment.rewrite",
        "rewrite": made.document,
        "left_out": list(made.left_out),
    }


@router.post(
    "/v1/model-rewrites",
    status_code=201,
    response_model=ImportedRewrite,
    response_model_exclude_unset=True,
    responses=errors(404, 409, 413),
)
async def create(body: Rewrite, services: Injected, caller: Managing) -> Json:
    """Define an experiment for each model that the rewrite splits; one that can't be is an error,
    after which those before it are there."""
    definitions, lines = imported(body)
    data = [await experiments.create(each, services, caller) for each in definitions]
    return {"object": "list", "data": data, "left_out": lines}
