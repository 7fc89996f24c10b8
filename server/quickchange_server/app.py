"""Puts the server together: its parts, its routes, and its life from start to drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from quickchange_server.api import adapters, health, models, openai, page, refusals, vllm
from quickchange_server.api.middleware import BodyLimitMiddleware, RequestIdMiddleware
from quickchange_server.catalog import Catalog, base_names
from quickchange_server.channel import EngineMain, engine_main
from quickchange_server.client import EngineClient
from quickchange_server.imports import Imports
from quickchange_server.metrics import Metrics
from quickchange_server.metrics_storage import StorageMetrics
from quickchange_server.services import VERSION, Seeds, Services
from quickchange_server.settings import Settings
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions
from quickchange_server.text import Text
from quickchange_store.base import base_spec
from quickchange_store.canonical import BaseSpec
from quickchange_store.store import Store

BaseMaker = Callable[[], BaseSpec]


def create_app(
    settings: Settings,
    *,
    text: Text | None = None,
    engine: EngineMain = engine_main,
    base: BaseMaker | None = None,
) -> FastAPI:
    """The application; its parts are at `app.state.services` once it has started.

    `text`, `engine` and `base` replace the tokenizer of the model, the engine's entry and what
    adapters are checked against. Raises SettingError where the model's tokenizer can't be read.

    Requests are answered while the engine still starts, with 503. `services.started` tells when it
    is ready, or why it can't be.
    """
    text = Text.load(settings.model) if text is None else text
    base = partial(base_spec, settings.model) if base is None else base

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics(settings)
        url, counts = settings.database_url, StorageMetrics(metrics.registry)
        database = await asyncio.to_thread(Database.open, url, counts)
        services = _services(settings, metrics, text, engine, base, database)
        services.revisions.start()
        app.state.services = services
        try:
            yield
        finally:
            await _end(services)

    app = FastAPI(title="Quickchange", version=VERSION, lifespan=lifespan)
    for router in (openai.router, models.router, vllm.router, adapters.router, health.router):
        app.include_router(router)
    app.include_router(page.router)
    refusals.install(app)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=settings.max_request_bytes,
        uploads=adapters.UPLOADS,
        upload_limit=settings.max_upload_bytes,
    )
    app.add_middleware(RequestIdMiddleware)
    return app


def _services(
    settings: Settings,
    metrics: Metrics,
    text: Text,
    engine: EngineMain,
    base: BaseMaker,
    database: Database,
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
        store=store,
        catalog=Catalog(
            store,
            names,
            adapters=settings.adapters,
            turbo=settings.turbo,
            prompt_lookup=settings.prompt_lookup,
        ),
        imports=Imports(store, base, names),
        seeds=Seeds(settings.seed),
        started=asyncio.create_task(client.start(), name="engine-start"),
        database=database,
        revisions=Revisions(database),
    )


async def _end(services: Services) -> None:
    """Drain what still runs, end the engine, and commit what was recorded."""
    if not services.started.done():
        services.started.cancel()
    await asyncio.wait([services.started])
    await services.client.close(services.settings.drain_seconds)
    await services.revisions.close()
    await services.database.close()
