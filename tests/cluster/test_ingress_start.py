"""When an ingress begins to take requests, and what it leaves to Serve's proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from quickchange_server.api.middleware import RequestIdMiddleware
from quickchange_server.cluster import ingress_deployment, serve_replica
from quickchange_server.cluster.ingress_deployment import IngressReplica, OneRequestId


class Board:
    """Serve's handle of a board that notes what is called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def remote(*_: Any) -> None:
            self.called.append(name)

        return SimpleNamespace(remote=remote)


def application(started: asyncio.Future[None], board: Board | None = None) -> FastAPI:
    """The application of an ingress whose engines are known by `started`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = SimpleNamespace(
            started=started,
            metrics=SimpleNamespace(registry=CollectorRegistry()),
            client=SimpleNamespace(state="starting", in_flight=0),
        )
        yield

    ingress = IngressReplica.__new__(IngressReplica)
    ingress._app = FastAPI(lifespan=lifespan)
    ingress._board = board or Board()
    ingress._label, ingress._node = "ingress-test", "node"
    return ingress.__serve_build_asgi_app__()


def test_an_ingress_takes_requests_once_an_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_replica, "is_stopping", lambda: False)

    async def scenario() -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        app = application(started)
        lifespan = app.router.lifespan_context(app)
        entering = asyncio.create_task(lifespan.__aenter__())
        await asyncio.sleep(0.05)
        assert not entering.done()
        started.set_result(None)
        await asyncio.wait_for(entering, 5)
        await lifespan.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_an_ingress_reports_to_the_board_until_it_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress_deployment, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(serve_replica, "is_stopping", lambda: False)
    board = Board()

    async def scenario() -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        started.set_result(None)
        app = application(started, board)
        async with asyncio.timeout(5), app.router.lifespan_context(app):
            while board.called.count("report") < 3:
                await asyncio.sleep(0.01)
        assert board.called[-1] == "leave"
        assert board.called.count("leave") == 1

    asyncio.run(scenario())


def test_without_engines_an_ingress_begins_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress_deployment, "READY_SECONDS", 0.01)
    monkeypatch.setattr(serve_replica, "is_stopping", lambda: False)

    async def scenario() -> None:
        app = application(asyncio.get_running_loop().create_future())
        async with asyncio.timeout(5), app.router.lifespan_context(app):
            assert not app.state.services.started.done()

    asyncio.run(scenario())


def test_the_proxy_alone_gives_an_answer_its_request_id() -> None:
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "text"

    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(OneRequestId)

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as http:
            return await http.get("/", headers={"x-request-id": "mine"})

    answer = asyncio.run(scenario())
    assert (answer.status_code, answer.json()) == (200, "text")
    assert "x-request-id" not in answer.headers
