"""The HTTP server as a replica of Ray Serve: today's application, its engines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI

from quickchange_server.cluster import serve_replica
from quickchange_server.cluster.ray_calls import RayCalls, answer
from quickchange_server.config import Settings
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.entrypoints.app import create_app

REPORT_SECONDS = 1.0

logger = logging.getLogger(__name__)


class IngressReplica:
    """The user's class of the deployment `Ingress`, which `serve.ingress` wraps."""

    def __init__(self, settings: Settings, engines: Any, board: Any) -> None:
        serve_replica.log()
        self._board = board
        self._label, self._node = serve_replica.label(), serve_replica.node()
        make = partial(RemoteEngines, calls=RayCalls(engines, board))
        self._app = create_app(settings, engines=make)
        self._reporting = asyncio.create_task(self._report_on(), name="reports")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def __del__(self) -> None:
        self._reporting.cancel()
        with suppress(ReplicaLostError):  # it is forgotten soon anyway
            await answer(self._board.leave.remote, self._label)

    async def _report_on(self) -> None:
        """Report to the board for ever."""
        while True:
            try:
                await answer(self._board.report.remote, self._report(), {}, "", 0)
            except ReplicaLostError as error:
                logger.info("the board does not answer: %s", error)
            await asyncio.sleep(REPORT_SECONDS)

    def _report(self) -> ReplicaReport:
        services = getattr(self._app.state, "services", None)
        client = None if services is None else services.client
        state = "starting" if client is None else client.state
        if serve_replica.is_stopping():
            state = "draining"
        in_flight = 0 if client is None else client.in_flight
        return ReplicaReport(
            self._label, "ingress", self._node, state, running=in_flight, at=time.time()
        )
