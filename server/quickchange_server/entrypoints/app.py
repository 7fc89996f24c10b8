"""Assembly of the HTTP server: its parts, its routes, and its lifespan from start to drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from prometheus_client import Gauge
from starlette.middleware.cors import CORSMiddleware

from quickchange_server.adapter_registry.import_runner import BaseMaker, import_runner
from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.adapter_registry.merged_adapters import Derived
from quickchange_server.adapter_registry.on_demand import OnDemand
from quickchange_server.adapter_registry.resolver import PLACEHOLDERS, Catalog, base_names
from quickchange_server.adapter_registry.watched_folder import WatchedFolder
from quickchange_server.api import error_responses, health, openapi_document, page
from quickchange_server.api.admin import (
    adapter_adding,
    adapters,
    experiments,
    keys,
    model_rewrites,
    recordings,
    replicas,
    usage,
)
from quickchange_server.api.anthropic import message_errors, message_routes
from quickchange_server.api.app_state import VERSION, Services
from quickchange_server.api.auth import CallerMiddleware
from quickchange_server.api.browser import EXPOSED, BrowserMiddleware
from quickchange_server.api.error_responses import Surface
from quickchange_server.api.lorax import errors
from quickchange_server.api.lorax import routes as lorax
from quickchange_server.api.middleware import (
    BodyLimitMiddleware,
    PathMiddleware,
    RequestIdMiddleware,
)
from quickchange_server.api.openai import completions, models
from quickchange_server.api.openai.chat import chat_route
from quickchange_server.api.pooling import (
    embeddings,
    lorax_routes,
    pooling_routes,
    scoring_routes,
)
from quickchange_server.api.responses import response_routes
from quickchange_server.api.vllm import prompt_renderings, sagemaker
from quickchange_server.api.vllm import routes as vllm
from quickchange_server.config import Settings, is_remote
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.engines import EnginesMaker
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.errors import SettingError
from quickchange_server.experiments.exposures import Exposures
from quickchange_server.experiments.promotion import Promotions
from quickchange_server.experiments.registry import Experiments
from quickchange_server.experiments.shadows import Shadows
from quickchange_server.frontend.adapter_texts import AdapterTexts
from quickchange_server.frontend.request_admission import RequestAdmission, Seeds
from quickchange_server.frontend.request_observers import Bookkeeper
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.observability.cluster_metrics import Cluster
from quickchange_server.observability.experiment_metrics import ExperimentMetrics, ShareCollector
from quickchange_server.observability.gateways.genai_metrics import GenAiMetrics
from quickchange_server.observability.http_metrics import HttpMetricsMiddleware
from quickchange_server.observability.metrics import Metrics
from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.database import Database
from quickchange_server.storage.recordings.recorder import Recorder, RecordingLimits
from quickchange_server.storage.responses.stored_responses import StoredResponses
from quickchange_server.storage.revisions import Revisions
from quickchange_server.structured_output.validator import ConstraintChecks
from quickchange_server.tenants.key_records import TOPIC
from quickchange_server.tenants.shared_limits import CounterCalls
from quickchange_server.tenants.tenancy import Tenants, asks_for_keys
from quickchange_store.store import Store

if TYPE_CHECKING:
    from quickchange_server.observability.tracing import Traces

TracesMaker = Callable[[], "Traces"]


def create_app(
    settings: Settings,
    *,
    text: Text | None = None,
    engines: EnginesMaker | None = None,
    base: BaseMaker | None = None,
    limit_counter: CounterCalls | None = None,
    cluster: Cluster | None = None,
) -> FastAPI:
    """The application; its parts are at `app.state.services` once it has started.

    A process that has no torch gets none: what needs it runs in workers.

    `text`, `engines` and `base` replace the model's tokenizer, the engine of this machine and the
    base model that adapters are checked against. In a cluster, `limit_counter` counts the limits
    of API keys for all replicas, and `cluster` is what an ingress knows of the others. Raises
    SettingError if the tokenizer can't be read, if traces can't be sent as the settings ask, or if
    the settings would leave the server open to others, or to every web page, without saying so.

    While the engine starts, requests get 503. `services.started` resolves when it is ready, or to
    its failure.
    """
    text = Text.load_apart(settings.model) if text is None else text
    engines = partial(LocalEngines, main=engine_main) if engines is None else engines
    traces_maker = _traces_maker(settings)
    keyed = asks_for_keys(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics(settings)
        url, counts = settings.database_url, StorageMetrics(metrics.registry)
        database = await asyncio.to_thread(Database.open, url, counts)
        tenants = Tenants.make(
            settings, database, metrics.registry, keyed=keyed, counter=limit_counter
        )
        traces = None if traces_maker is None else traces_maker()
        books: tuple[Bookkeeper, ...] = () if traces is None else (traces,)
        if settings.genai_metrics:
            books += (GenAiMetrics(metrics.registry, settings.metrics_adapters),)
        services = _services(
            settings, metrics, text, engines, base, database, tenants, books, cluster
        )
        await _start(services)
        app.state.services = services
        try:
            yield
        finally:
            await _end(services)
            await tenants.close()
            if traces is not None:
                await traces.close()

    app = FastAPI(
        title="Quickchange",
        version=VERSION,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        redirect_slashes=False,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        docs_url=None,  # both are made with the document
        redoc_url=None,
    )
    for module in (
        completions,
        chat_route,
        message_routes,
        response_routes,
        lorax,
        lorax_routes,
        embeddings,
        pooling_routes,
        scoring_routes,
        models,
        vllm,
        prompt_renderings,
        sagemaker,
        adapters,
        adapter_adding,
        experiments,
        model_rewrites,
        recordings,
        keys,
        usage,
        replicas,
        health,
        page,
    ):
        app.include_router(module.router)
    lorax_paths = errors.paths_of(lorax.router, lorax_routes.router)
    error_responses.install(
        app,
        Surface(lambda request: request.scope["path"] in lorax_paths, errors.refusal),
        Surface(message_routes.is_anthropics, message_errors.refusal),
    )
    openapi_document.install(app, settings, keyed=keyed)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=settings.max_request_bytes,
        uploads=adapter_adding.UPLOADS,
        upload_limit=settings.max_upload_bytes,
    )
    app.add_middleware(CallerMiddleware)
    app.add_middleware(BrowserMiddleware, settings=settings)
    if settings.allowed_origins:
        _allow_origins(app, settings, keyed=keyed)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(HttpMetricsMiddleware)
    app.add_middleware(PathMiddleware, root_path=settings.root_path or "")
    return app


def _allow_origins(app: FastAPI, settings: Settings, *, keyed: bool) -> None:
    """Let pages of the allowed origins use the server. Raises SettingError."""
    if "*" in settings.allowed_origins and not keyed:
        raise SettingError(
            "allowed_origin: * lets every page that a browser shows use a server that asks for no "
            "keys; name the origins, or ask for keys with --api-keys",
            param="allowed_origin",
        )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=sorted(settings.allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
        allow_private_network=True,
    )


def _traces_maker(settings: Settings) -> TracesMaker | None:
    """The constructor of the trace exporter; None without one. Raises SettingError."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from quickchange_server.observability import tracing as traces
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
    engines: EnginesMaker,
    base: BaseMaker | None,
    database: Database,
    tenants: Tenants,
    books: tuple[Bookkeeper, ...],
    cluster: Cluster | None,
) -> Services:
    """The server's parts, with the engine starting. Called on the event loop."""
    client = EngineClient(settings, metrics, engines)
    if cluster is not None:
        metrics.join(cluster, client)
    store = Store(*settings.store_opening)
    Gauge(
        "quickchange_store_reachable",
        "0 while names are served as last read, since the store can't be reached",
        registry=metrics.registry,
    ).set_function(lambda: store.trouble is None)
    names = base_names(settings)
    constraints = ConstraintChecks(text, metrics.structured)
    seeds = Seeds(settings.seed)
    revisions = Revisions(database)
    experiments = Experiments(database, revisions)
    experiment_metrics = ExperimentMetrics(metrics.registry, settings.metrics_adapters)
    metrics.registry.register(ShareCollector(experiments.shares, experiment_metrics.label))
    exposures = Exposures(database, experiment_metrics)
    recorder = Recorder(
        database,
        revisions,
        RecordingLimits(
            settings.recorded_requests, settings.recorded_bytes, settings.recording_seconds
        ),
        names[0],
        partial(_there, store),
    )
    imports = Imports(
        import_runner(store, settings.model, settings.spare_tokens, base),
        names,
        experiments.refuse_name,
        settings.max_upload_bytes,
    )
    return Services(
        settings=settings,
        client=client,
        metrics=metrics,
        text=text,
        texts=AdapterTexts(text, store.tokenizer),
        constraints=constraints,
        store=store,
        catalog=Catalog(
            store,
            names,
            adapters=settings.adapters,
            turbo=settings.turbo,
            prompt_lookup=settings.prompt_lookup,
            further=lambda: experiments.all,
            tokens=text.vocab_size + settings.spare_tokens,
        ),
        imports=imports,
        derived=Derived(store, settings.derived_adapters),
        seeds=seeds,
        admission=RequestAdmission(client, text, constraints, seeds, recorder),
        started=asyncio.create_task(client.start(), name="engine-start"),
        database=database,
        revisions=revisions,
        experiments=experiments,
        exposures=exposures,
        experiment_metrics=experiment_metrics,
        shadows=Shadows(experiment_metrics, lambda: 2 * client.in_flight < settings.max_queue),
        promotions=Promotions(store, experiments),
        recorder=recorder,
        responses=_stored_responses(settings, database),
        on_demand=_on_demand(settings, imports, store, {*names, *PLACEHOLDERS}, experiments),
        watched=None
        if settings.adapter_watch is None
        else WatchedFolder(settings.adapter_watch, imports),
        keyring=tenants.keyring,
        books=(*books, tenants.books, exposures),
        cluster=cluster,
    )


def _there(store: Store) -> tuple[Collection[str], Collection[str]]:
    """The names of the store's adapters, and the digests of their versions."""
    index = store.snapshot()
    return index.entries.keys(), index.digests()


def _stored_responses(settings: Settings, database: Database) -> StoredResponses | None:
    """The store of responses; None if none are kept."""
    if not settings.store_responses:
        return None
    return StoredResponses(
        database,
        seconds=settings.store_responses_seconds,
        tenant_bytes=settings.store_responses_bytes,
        conversation_bytes=settings.max_request_bytes,
    )


def _on_demand(
    settings: Settings,
    imports: Imports,
    store: Store,
    names: Collection[str],
    experiments: Experiments,
) -> OnDemand | None:
    """What fetches adapters that requests name; None if nothing does. `names`: of the base."""
    if settings.adapter_resolver is None or not settings.adapters:
        return None
    return OnDemand(
        settings.adapter_resolver,
        imports,
        store,
        settings.adapter_resolver_names,
        lambda name: name in names or name in experiments.all,
    )


async def _start(services: Services) -> None:
    """Load keys and experiments from the database, and watch it for changes."""
    if services.keyring is not None:
        await services.keyring.refresh()
        services.revisions.watch(TOPIC, services.keyring.refresh)
    if is_remote(services.settings.store):  # read once; from then on it is answered from memory
        await asyncio.to_thread(services.store.snapshot)
    await services.revisions.look()  # loads experiments before the first request
    services.revisions.start()
    services.recorder.start()
    if services.responses is not None:
        services.responses.start()
    if services.watched is not None:
        services.watched.start()


async def _end(services: Services) -> None:
    """Drain running requests, end the engine, and commit all records."""
    if not services.started.done():
        services.started.cancel()
    await asyncio.wait([services.started])
    if services.watched is not None:
        await services.watched.close()
    if services.on_demand is not None:
        await services.on_demand.close()
    await services.imports.close()
    await services.derived.close()
    await services.shadows.close()
    await services.client.close(services.settings.drain_seconds)
    await services.constraints.close()
    if services.responses is not None:
        await services.responses.close()
    await services.recorder.close()
    await services.revisions.close()
    await services.database.close()
