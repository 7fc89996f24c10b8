"""Puts the server together: its parts, its routes, and its life from start to drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI

from quickchange_server.api import adapters, embeddings, health, models, openai, refusals, vllm
from quickchange_server.api.lorax import failures
from quickchange_server.api.lorax import routes as lorax
from quickchange_server.api.middleware import BodyLimitMiddleware, RequestIdMiddleware
from quickchange_server.api.page import router as page
from quickchange_server.books import Bookkeeper
from quickchange_server.catalog import Catalog, base_names
from quickchange_server.channel import EngineMain, engine_main
from quickchange_server.client import EngineClient
from quickchange_server.constraints.checks import ConstraintChecks
from quickchange_server.derived import Derived
from quickchange_server.errors import SettingError
from quickchange_server.imports import Imports
from quickchange_server.metrics import Metrics
from quickchange_server.metrics_http import HttpMetricsMiddleware
from quickchange_server.metrics_storage import StorageMetrics
from quickchange_server.services import VERSION, Seeds, Services
from quickchange_server.settings import Settings
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions
from quickchange_server.text import Text
from quickchange_store.base import base_spec
from quickchange_store.canonical import BaseSpec
from quickchange_store.store import Store

if TYPE_CHECKING:
    from quickchange_server.traces import Traces

BaseMaker = Callable[[], BaseSpec]
TracesMaker = Callable[[], "Traces"]


def create_app(
    settings: Settings,
    *,
    text: Text | None = None,
    engine: EngineMain = engine_main,
    base: BaseMaker | None = None,
) -> FastAPI:
    """The application; its parts are at `app.state.services` once it has started.

    `text`, `engine` and `base` replace the tokenizer of the model, the engine's entry and what
    adapters are checked against. Raises SettingError where the model's tokenizer can't be read, or
    where traces are asked for and can't be sent.

    Requests are answered while the engine still starts, with 503. `services.started` tells when it
    is ready, or why it can't be.
    """
    text = Text.load(settings.model) if text is None else text
    base = partial(base_spec, settings.model) if base is None else base
    traces_maker = _traces_maker(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics(settings)
        url, counts = settings.database_url, StorageMetrics(metrics.registry)
        database = await asyncio.to_thread(Database.open, url, counts)
        traces = None if traces_maker is None else traces_maker()
        books = () if traces is None else (traces,)
        services = _services(settings, metrics, text, engine, base, database, books)
        services.revisions.start()
        app.state.services = services
        try:
            yield
        finally:
            await _end(services)
            if traces is not None:
                await traces.close()

    app = FastAPI(title="Quickchange", version=VERSION, lifespan=lifespan)
    for router in (
        openai.router,
        lorax.router,
        embeddings.router,
        models.router,
        vllm.router,
        adapters.router,
        health.router,
    ):
        app.include_router(router)
    app.include_router(page)
    refusals.install(app)
    failures.install(app, lorax.PATHS)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=settings.max_request_bytes,
        uploads=adapters.UPLOADS,
        upload_limit=settings.max_upload_bytes,
    )
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(HttpMetricsMiddleware)
    return app


def _traces_maker(settings: Settings) -> TracesMaker | None:
    """What starts sending traces, where the settings ask for them. Raises SettingError."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from quickchange_server import traces
    except ModuleNotFoundError as error:
        raise SettingError(
            "otlp_endpoint: traces need OpenTelemetry, which is not installed; "
            "pip install 'quickchange[traces]', or leave the setting out",
            param="otlp_endpoint",
        ) from error
    return partial(traces.Traces, traces.address(settings.otlp_endpoint), VERSION)


def _services(
    settings: Settings,
    metrics: Metrics,
    text: Text,
    engine: EngineMain,
    base: BaseMaker,
    database: Database,
    books: tuple[Bookkeeper, ...],
) -> Services:
    """The server's parts, with the engine starting. On the event loop."""
    client = EngineClient(settings, metrics, engine)
    store = Store(settings.store)
    names = base_names(settings)
    return Services(
        settings=settings,
        client=client,
        metrics=metrics,
        text=text,
        constraints=ConstraintChecks(text, metrics.structured),
        store=store,
        catalog=Catalog(
            store,
            names,
            adapters=settings.adapters,
            turbo=settings.turbo,
            prompt_lookup=settings.prompt_lookup,
        ),
        imports=Imports(store, base, names),
        derived=Derived(store, settings.derived_adapters),
        seeds=Seeds(settings.seed),
        started=asyncio.create_task(client.start(), name="engine-start"),
        books=books,
        database=database,
        revisions=Revisions(database),
    )


async def _end(services: Services) -> None:
    """Drain what still runs, end the engine, and commit what was recorded."""
    if not services.started.done():
        services.started.cancel()
    await asyncio.wait([services.started])
    await services.derived.close()
    await services.client.close(services.settings.drain_seconds)
    await services.constraints.close()
    await services.revisions.close()
    await services.database.close()
