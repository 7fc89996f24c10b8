"""The HTTP server as a replica of Ray Serve: today's application, its engines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.app_state import Services
from quickchange_server.cluster import serve_replica
from quickchange_server.cluster.ray_calls import RayCalls, answer
from quickchange_server.cluster.routing.routing_memory import ROUTED
from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.client_observer import EngineObserver
from quickchange_server.engine_client.engines import Ended
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.entrypoints.app import create_app
from quickchange_server.errors import QuickchangeError
from quickchange_server.observability.cluster_metrics import Cluster
from quickchange_server.observability.replica_metrics import OwnSnapshot

REPORT_SECONDS = 1.0
READY_SECONDS = 30.0

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]

logger = logging.getLogger(__name__)


class OneRequestId:
    """ASGI middleware that leaves `x-request-id` to Serve's proxy, which gives it to the request
    and to the answer: the application's own would be there twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"]]}
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


class IngressReplica:
    """The user's class of the deployment `Ingress`, which `serve.ingress` wraps."""

    def __init__(self, settings: Settings, engines: Any, board: Any) -> None:
        serve_replica.log()
        self._wanted = 0  # engine replicas that there should be, at least
        self._board = board
        self._calls = RayCalls(engines, board)
        self._label, self._node = serve_replica.label(), serve_replica.node()
        self._engines: RemoteEngines | None = None
        # Whether keys are asked for goes by who can reach the proxies, however they were started.
        host = serve_replica.proxy_host() or settings.host
        self._app = create_app(
            settings.model_copy(update={"host": host}),
            engines=self._make_engines,
            limit_counter=self._calls,
            cluster=Cluster(self._label, self._view, lambda: self._wanted, ROUTED.snapshot),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve runs its lifespan and passes it what comes over HTTP."""
        self._app.add_middleware(OneRequestId)
        self._app.router.lifespan_context = partial(
            self._lifespan, self._app.router.lifespan_context
        )
        return self._app

    def reconfigure(self, changeable: Mapping[str, int]) -> None:
        """Take what changes without a new replica; Serve calls it at the start, too."""
        self._wanted = changeable["engines"]

    @asynccontextmanager
    async def _lifespan(self, lifespan: Lifespan, app: FastAPI) -> AsyncIterator[Any]:
        """The application's lifespan, with reports to the board.

        It begins once an engine is known to take requests, since Serve sends none before; without
        engines after READY_SECONDS, so that health and metrics can be asked for.
        """
        async with lifespan(app) as state:
            reporting = asyncio.create_task(self._report_on(app.state.services), name="reports")
            await asyncio.wait([app.state.services.started], timeout=READY_SECONDS)
            try:
                yield state
            finally:
                reporting.cancel()
        with suppress(ReplicaLostError, QuickchangeError):  # it is forgotten soon anyway
            await answer(self._board.leave.remote, self._label)

    def _make_engines(
        self, settings: Settings, observer: EngineObserver, ended: Ended
    ) -> RemoteEngines:
        self._engines = RemoteEngines(settings, observer, ended, calls=self._calls)
        return self._engines

    def _view(self) -> ClusterView:
        return ClusterView(()) if self._engines is None else self._engines.view

    async def _report_on(self, services: Services) -> None:
        """Report to the board for ever."""
        own = OwnSnapshot(services.metrics.registry, self._label, "ingress")
        while True:
            report = self._report(services.client, await own.latest())
            try:
                await answer(self._board.report.remote, report, {}, "", 0)
            except (ReplicaLostError, QuickchangeError) as error:
                logger.info("the board does not answer: %s", error)
            await asyncio.sleep(REPORT_SECONDS)

    def _report(self, client: EngineClient, metrics: bytes) -> ReplicaReport:
        return ReplicaReport(
            self._label,
            "ingress",
            self._node,
            "draining" if serve_replica.is_stopping() else client.state,
            running=client.in_flight,
            metrics=metrics,
            at=time.time(),
        )
