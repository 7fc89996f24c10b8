"""HEAD, OPTIONS, `Allow` and trailing slashes, the same on every route."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest
from http_support import BASE, Live, live_server, make_adapter

GETS = ["/", "/health", "/health/live", "/health/ready", "/ping", "/metrics", "/version"]
GETS += ["/v1/models", f"/v1/models/{BASE}", "/v1/adapters", "/v1/adapters/sql", "/v1/aliases"]
GETS += ["/info", "/v1/keys", "/v1/usage", "/v1/experiments", "/openapi.json", "/page/main.js"]
ALLOWED = {
    "/": {"GET", "HEAD", "POST"},
    "/ping": {"GET", "HEAD", "POST"},
    "/health": {"GET", "HEAD"},
    "/v1/completions": {"POST"},
    "/v1/adapters": {"GET", "HEAD", "POST"},
    "/v1/aliases/live": {"PUT", "DELETE"},
    "/v1/experiments/x": {"GET", "HEAD", "PATCH", "DELETE"},
    "/generate": {"POST"},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("paths")) as live:
        live.store.add("sql", make_adapter(1.0))
        yield live


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_its_body(live: Live, path: str) -> None:
    got, head = live.http.get(path), live.http.head(path)
    assert (got.status_code, head.status_code) == (200, 200)
    assert (head.content, head.headers["content-type"]) == (b"", got.headers["content-type"])


def test_a_connection_goes_on_after_head(live: Live) -> None:
    with closing(http.client.HTTPConnection(live.url.removeprefix("http://"))) as connection:
        for method in ("HEAD", "OPTIONS", "GET"):
            connection.request(method, "/health")
            answer = connection.getresponse()
            body = answer.read()
    assert (answer.status, body) == (200, b'{"state":"ready"}')


@pytest.mark.parametrize("path", ALLOWED)
def test_allow_has_every_method_of_the_path(live: Live, path: str) -> None:
    wrong = live.http.request("PUT" if path != "/v1/aliases/live" else "POST", path)
    assert wrong.status_code == 405
    assert set(wrong.headers["allow"].split(", ")) == ALLOWED[path] | {"OPTIONS"}
    asked = live.http.options(path)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["allow"] == wrong.headers["allow"]


def test_a_path_that_is_none_has_no_options(live: Live) -> None:
    assert live.http.options("/nothing").status_code == 404
    assert live.http.head("/nothing").status_code == 404


@pytest.mark.parametrize("path", [path for path in GETS if path != "/"])
def test_a_trailing_slash_counts_for_nothing(live: Live, path: str) -> None:
    assert live.http.get(f"{path}/").status_code == 200


def test_a_body_survives_a_trailing_slash(live: Live) -> None:
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 1}
    assert live.post("/v1/completions/", body).status_code == 200
