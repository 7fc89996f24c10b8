"""The application's state: one typed object at `app.state.services`, which routes get injected.

`entrypoints/app.py` makes it. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends, Request

from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.adapter_registry.merged_adapters import Derived
from quickchange_server.adapter_registry.on_demand import OnDemand
from quickchange_server.adapter_registry.resolver import Catalog
from quickchange_server.adapter_registry.watched_folder import WatchedFolder
from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.experiments.exposures import Exposures
from quickchange_server.experiments.promotion import Promotions
from quickchange_server.experiments.registry import Experiments
from quickchange_server.experiments.shadows import Shadows
from quickchange_server.frontend.adapter_texts import AdapterTexts
from quickchange_server.frontend.request_admission import RequestAdmission, Seeds
from quickchange_server.frontend.request_observers import Bookkeeper
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.observability.cluster_metrics import Cluster
from quickchange_server.observability.experiment_metrics import ExperimentMetrics
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Ready
from quickchange_server.storage.database import Database
from quickchange_server.storage.recordings.recorder import Recorder
from quickchange_server.storage.responses.stored_responses import StoredResponses
from quickchange_server.storage.revisions import Revisions
from quickchange_server.structured_output.validator import ConstraintChecks
from quickchange_server.tenants.keyring import Keyring
from quickchange_store.store import Store

VERSION = version("quickchange")


@dataclass(frozen=True)
class Services:
    """The parts of one server. `started` resolves when the engine is ready, or to its failure."""

    settings: Settings
    client: EngineClient
    metrics: Metrics
    text: Text  # the base's, or where one is served that brings its own, an adapter's
    texts: AdapterTexts
    constraints: ConstraintChecks
    store: Store
    catalog: Catalog
    imports: Imports
    derived: Derived
    seeds: Seeds
    admission: RequestAdmission
    started: asyncio.Future[Ready]
    database: Database
    revisions: Revisions
    experiments: Experiments
    exposures: Exposures  # the only observer of shadow requests; also in `books`
    experiment_metrics: ExperimentMetrics
    shadows: Shadows
    promotions: Promotions
    recorder: Recorder
    responses: StoredResponses | None = None  # None: none are kept
    on_demand: OnDemand | None = None  # None: requests have nothing fetched
    watched: WatchedFolder | None = None
    keyring: Keyring | None = None  # None: no request needs an API key
    books: tuple[Bookkeeper, ...] = ()
    cluster: Cluster | None = None  # None: a single machine
    created: int = field(default_factory=lambda: int(time.time()))  # base model's, in /v1/models

    @property
    def engine(self) -> Ready:
        """The engine's report of itself. Raises UnavailableError until the engine is ready."""
        return self.client.engine

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: it changes if the same request and seed may differ."""
        settings, engine = self.settings, self.engine
        parts = (
            VERSION,
            settings.model,
            engine.dtype,
            engine.adapter_dtype,
            settings.quantization,
            settings.device,
            *(["deterministic"] if settings.deterministic else []),
        )
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


async def services_of(request: Request) -> Services:
    """FastAPI dependency: the application's services."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Injected = Annotated[Services, Depends(services_of)]
