"""Routes for operators: liveness, readiness and Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import ADMIN, METRICS_PATH
from quickchange_server.api.openapi.response_models import EngineState
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, PLAIN_TEXT, Responses
from quickchange_server.frontend.request_base import Json
from quickchange_store.errors import CorruptStoreError

NOT_READY: Responses = {503: {"model": EngineState, "description": "No requests are taken"}}
FAILED: Responses = {503: {"model": EngineState, "description": "Engines fail one after another"}}

router = APIRouter(tags=["health"])


@router.get("/health", response_model=EngineState, responses=NOT_READY)
@router.get("/health/ready", response_model=EngineState, responses=NOT_READY)
@router.get("/ping", response_model=EngineState, responses=NOT_READY, tags=["vLLM"])
@router.post("/ping", response_model=EngineState, responses=NOT_READY, tags=["vLLM"])
async def ready(services: Injected) -> Response:
    """Readiness: 200 while requests are taken, else 503; the body has the engine's state.

    In a cluster it also has the engine replicas that are ready, and how many there should be.
    Where the store can't be reached, it says so too: requests for names known so far go on.
    """
    state = services.client.state
    body: Json = {"state": state}
    if services.cluster is not None:
        body["replicas"] = services.cluster.counts()
    if (trouble := services.store.trouble) is not None:
        body["store"] = trouble
    return JSONResponse(body, 200 if state in ("ready", "restarting") else 503)


@router.get("/health/live", response_model=EngineState, responses=FAILED)
async def live(services: Injected) -> Response:
    """Liveness: 503 while engines fail one after another, else 200 as long as the server answers.

    The server goes on starting engines, with growing pauses; a restart of it may help sooner. An
    ingress of a cluster lives whatever its engines do, which others start.
    """
    failed = services.client.state == "failed" and services.cluster is None
    return JSONResponse({"state": "failed" if failed else "live"}, 503 if failed else 200)


@router.get(
    METRICS_PATH,
    dependencies=[Depends(ADMIN)],
    response_class=Response,
    responses=COMMON_ERRORS | PLAIN_TEXT,
)
async def metrics(services: Injected) -> Response:
    """Prometheus metrics; in a cluster those of all replicas, each with the label `replica`."""
    names = _names(services)
    if services.cluster is None:
        body, content_type = services.metrics.render(names)
    else:
        body, content_type = await services.metrics.render_all(services.cluster, names)
    return Response(body, headers={"Content-Type": content_type})


def _names(services: Services) -> Callable[[str], str | None]:
    """The name of an adapter version by its digest: the store's, or the one that it was asked for
    by, as one that was merged for a request."""
    names: dict[str, str] = {}
    try:
        index = services.store.snapshot()
    except CorruptStoreError:
        pass  # every request for an adapter says so; the metrics are to be had all the same
    else:
        for name, entry in index.entries.items():
            names |= {version.digest: name for version in entry.versions.values()}
    return lambda digest: names.get(digest) or services.client.residency.label(digest)
