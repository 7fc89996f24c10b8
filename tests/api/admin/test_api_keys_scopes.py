"""Every route asks for its scope: walked over the app's own routes, so that none is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from http_support import BASE_SPEC, Live
from keys_support import client_of, created, keyed_server
from starlette.routing import BaseRoute
from text_support import byte_text

from quickchange_server.api.auth import OPEN, Needs
from quickchange_server.api.page import FILES
from quickchange_server.config import Settings
from quickchange_server.entrypoints.app import create_app
from quickchange_server.frontend.caller import SCOPES, Scope

# FastAPI's own: the documents. They need a key as everything does that isn't open.
DOCUMENTS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}

# What a key must be able to do, written down a second time: a scope that is changed by mistake,
# on a route or on a whole router, fails here.
EXPECTED: dict[Scope, set[str]] = {
    "infer": {
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /v1/responses",
        "POST /v1/messages",
        "POST /v1/messages/count_tokens",
        "POST /v1/embeddings",
        "POST /pooling",
        "POST /score",
        "POST /v1/score",
        "POST /rerank",
        "POST /v1/rerank",
        "POST /v2/rerank",
        "GET /v1/models",
        "GET /v1/models/{model:path}",
        "POST /tokenize",
        "POST /detokenize",
        "GET /version",
        "GET /tokenizer_info",
        "GET /load",
        "GET /v1/usage",
        "POST /generate",
        "POST /generate_stream",
        "POST /",
        "POST /invocations",
        "GET /info",
        "POST /embed",
        "POST /classify",
        "POST /classify_batch",
    },
    "manage": {
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
        "POST /adapters",
        "DELETE /adapters/{adapter_name}",
        "GET /v1/adapters",
        "POST /v1/adapters",
        "GET /v1/adapters/{reference:path}",
        "DELETE /v1/adapters/{reference:path}",
        "POST /v1/adapters/{name:path}/rollback",
        "POST /v1/adapters/{reference:path}/pin",
        "POST /v1/adapters/{reference:path}/unpin",
        "POST /v1/adapters/{reference:path}/prefetch",
        "GET /v1/aliases",
        "PUT /v1/aliases/{alias:path}",
        "DELETE /v1/aliases/{alias:path}",
    },
    "admin": {
        "POST /v1/keys",
        "GET /v1/keys",
        "GET /v1/keys/{id}",
        "PATCH /v1/keys/{id}",
        "DELETE /v1/keys/{id}",
        "POST /v1/keys/{id}/rotate",
        "GET /v1/recordings",
        "PUT /v1/recordings/{reference:path}",
        "GET /v1/recordings/{reference:path}",
        "DELETE /v1/recordings/{reference:path}",
        "GET /metrics",
        "GET /v1/cluster",
    },
}


def make_app() -> FastAPI:
    settings = Settings(model="unused", store=Path("unused"))
    return create_app(settings, text=byte_text(), base=lambda: BASE_SPEC)


def routes_of(app: FastAPI) -> list[APIRoute]:
    """All routes of the app's routers; fails on a route of a kind that it does not know."""
    found: list[APIRoute] = []

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                found.append(route)
            elif (inner := getattr(route, "original_router", None)) is not None:
                walk(inner.routes)
            else:
                assert getattr(route, "path", None) in DOCUMENTS, route

    walk(app.routes)
    return found


def scopes_of(dependant: Dependant) -> set[Scope]:
    own = {dependant.call.scope} if isinstance(dependant.call, Needs) else set()
    return own.union(*map(scopes_of, dependant.dependencies))


def declared() -> dict[str, set[Scope]]:
    """The scopes that each method and path asks for, by its dependencies."""
    return {
        f"{method} {route.path}": scopes_of(route.dependant)
        for route in routes_of(make_app())
        for method in sorted(route.methods)
    }


def test_every_route_declares_one_scope_or_is_open() -> None:
    undecided = [
        name
        for name, scopes in declared().items()
        if len(scopes) != 1 and not (tuple(name.split()) in OPEN and not scopes)
    ]
    assert undecided == []


def test_open_are_the_probes_and_the_page_alone() -> None:
    probes = {"GET /health", "GET /health/live", "GET /health/ready", "GET /ping", "POST /ping"}
    page = {"GET /", *(f"GET /page/{name}" for name in FILES)}
    assert {" ".join(one) for one in OPEN} == probes | page


def test_routes_ask_for_the_scopes_that_are_meant() -> None:
    scopes = declared()
    wrong = {
        name: (scope, scopes.get(name))
        for scope, names in EXPECTED.items()
        for name in names
        if scopes.get(name) != {scope}
    }
    assert wrong == {}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("scopes")
    with keyed_server(folder, store_responses=True) as live:
        yield live


@pytest.fixture(scope="module")
def clients(live: Live) -> Iterator[dict[Scope | None, httpx.Client]]:
    clients: dict[Scope | None, httpx.Client] = {}
    for scope in (*SCOPES, None):
        secret = None if scope is None else created(live, scope=scope)[1]
        with client_of(live, secret) as client:
            clients[scope] = httpx.Client(base_url=live.url, headers=client.headers, timeout=30)
    yield clients
    for client in clients.values():
        client.close()


@pytest.mark.parametrize("name", sorted(declared()))
def test_a_route_answers_401_without_a_key_and_403_below_its_scope(
    clients: dict[Scope | None, httpx.Client], name: str
) -> None:
    method, _, path = name.partition(" ")
    sent = path.replace("{", "").replace("}", "").replace(":path", "")
    statuses = {
        scope: client.request(method, sent, json={} if method != "GET" else None).status_code
        for scope, client in clients.items()
    }
    if (method, path) in OPEN:
        assert set(statuses.values()) == {200}
        return
    (needed,) = declared()[name]
    assert statuses[None] == 401
    for scope in SCOPES:
        refused = SCOPES.index(scope) < SCOPES.index(needed)
        assert (statuses[scope] == 403) is refused, (scope, statuses)
        assert statuses[scope] != 401


@pytest.mark.parametrize("path", [*sorted(DOCUMENTS), "/no/such/route", "//health"])
def test_what_is_not_open_needs_a_key_known_or_not(
    live: Live, clients: dict[Scope | None, httpx.Client], path: str
) -> None:
    # Whole: of "//health" alone a client makes a host.
    assert clients[None].get(f"{live.url}{path}").status_code == 401


def test_metrics_are_open_by_their_own_setting(tmp_path: Path) -> None:
    with keyed_server(tmp_path, open_metrics=True) as live, client_of(live, None) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401
