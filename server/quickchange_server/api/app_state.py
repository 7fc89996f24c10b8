"""What the routes work with, in one typed object that `app.state.services` holds."""

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
from quickchange_server.adapter_registry.resolver import Catalog
from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.experiments.exposures import Exposures
from quickchange_server.experiments.promotion import Promotions
from quickchange_server.experiments.registry import Experiments
from quickchange_server.experiments.shadows import Shadows
from quickchange_server.frontend.request_admission import RequestAdmission, Seeds
from quickchange_server.frontend.request_observers import Bookkeeper
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.observability.experiment_metrics import ExperimentMetrics
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Ready
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions
from quickchange_server.structured_output.validator import ConstraintChecks
from quickchange_server.tenants.keyring import Keyring
from quickchange_store.store import Store

VERSION = version("quickchange")


@dataclass(frozen=True)
class Services:
    """One server's parts. `started` is done when the engine is ready, or holds why it is not."""

    settings: Settings
    client: EngineClient
    metrics: Metrics
    text: Text
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
    exposures: Exposures  # the one book that shadow requests are in; one of `books`
    experiment_metrics: ExperimentMetrics
    shadows: Shadows
    promotions: Promotions
    keyring: Keyring | None = None  # None: no request needs an API key
    books: tuple[Bookkeeper, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))  # of the base, in /v1/models

    @property
    def engine(self) -> Ready:
        """What the engine said of itself. Raises UnavailableError while it has not."""
        return self.client.engine

    @property
    def fingerprint(self) -> str:
        """Changes where the same request and seed may give another result."""
        settings = self.settings
        parts = (
            VERSION,
            settings.model,
            settings.dtype,
            settings.held_adapter_dtype,
            settings.quantization,
            settings.device,
        )
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


async def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Injected = Annotated[Services, Depends(services_of)]
