"""Requests that a page of another origin makes a browser send, as headers tell them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_support import Live, live_server, make_adapter
from keys_support import keyed_server
from text_support import byte_text

from quickchange_server.config import Settings
from quickchange_server.entrypoints.app import create_app
from quickchange_server.errors import SettingError

APP = "https://app.example"
CHANGE = "/v1/adapters/sql/rollback"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(
        tmp_path_factory.mktemp("browser"),
        allowed_host="llm.example",
        allowed_origin=f"{APP}, x://y",
    ) as live:
        live.store.add("sql", make_adapter(1.0))
        live.store.add("sql", make_adapter(2.0))
        yield live


def refused(response: httpx.Response, setting: str) -> bool:
    return response.status_code == 403 and setting in response.text


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "0.0.0.0:{port}",
        "[2001:db8::1]",
        "notlocalhost",
        "a b",
        "",
        "llm.example.evil",
    ],
)
def test_a_name_that_was_pointed_here_is_refused(live: Live, host: str) -> None:
    port = live.url.rpartition(":")[2]
    for method, path in (("GET", "/v1/models"), ("POST", CHANGE), ("GET", "/"), ("GET", "/health")):
        answer = live.http.request(method, path, headers={"Host": host.format(port=port)})
        assert refused(answer, "allowed_host")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost",
        "LOCALHOST:{port}",
        "localhost.",
        "[::1]:{port}",
        "127.8.9.10",
        "llm.example",
        "LLM.example.:443",
    ],
)
def test_the_servers_own_names_are_answered(live: Live, host: str) -> None:
    host = host.format(port=live.url.rpartition(":")[2])
    assert live.http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", f"{APP}.evil"],
)
def test_a_page_of_another_origin_changes_and_reads_nothing(live: Live, origin: str) -> None:
    for method, path in (("POST", CHANGE), ("GET", "/v1/models"), ("DELETE", "/v1/adapters/sql")):
        assert refused(
            live.http.request(method, path, headers={"Origin": origin}), "allowed_origin"
        )
    assert live.store.snapshot().entries["sql"].current == 2


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_elsewhere_includes_or_posts_is_refused(live: Live, site: str) -> None:
    for method in ("GET", "POST"):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
        path = CHANGE if method == "POST" else "/v1/models"
        assert refused(live.http.request(method, path, headers=headers), "allowed_origin")


def test_a_form_that_navigates_here_changes_nothing(live: Live) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = live.http.post(CHANGE, headers={**headers, "Sec-Fetch-Dest": "document"})
    assert refused(answer, "allowed_origin")


def test_a_link_from_elsewhere_opens_the_page(live: Live) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert live.http.get("/", headers={**headers, "Sec-Fetch-Dest": "document"}).status_code == 200
    assert live.http.get("/", headers={**headers, "Sec-Fetch-Dest": "iframe"}).status_code == 403


@pytest.mark.parametrize("origin", ["{url}", "http://LOCALHOST:{port}"])
def test_the_servers_own_page_is_answered(live: Live, origin: str) -> None:
    port = live.url.rpartition(":")[2]
    host = "localhost:" + port if "LOCAL" in origin else "127.0.0.1:" + port
    headers = {"Host": host, "Origin": origin.format(url=live.url, port=port)}
    answer = live.http.get("/v1/models", headers={**headers, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200


def test_a_proxy_that_speaks_tls_keeps_the_page_working(live: Live) -> None:
    headers = {"Host": "llm.example", "Origin": "https://llm.example"}
    assert live.http.get("/v1/models", headers=headers).status_code == 200


def test_an_allowed_origin_is_answered_with_its_headers(live: Live) -> None:
    headers = {"Origin": APP, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    answer = live.http.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == APP
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    wrong = live.http.post("/v1/completions", headers=headers, json={})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, APP)


def preflight(live: Live, origin: str) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers |= {"Access-Control-Request-Headers": "authorization,content-type,x-other"}
    return live.http.options("/v1/chat/completions", headers=headers)


def test_a_preflight_of_an_allowed_origin_alone_is_granted(live: Live) -> None:
    granted = preflight(live, APP)
    assert granted.status_code == 200
    assert granted.headers["access-control-allow-origin"] == APP
    allowed = granted.headers["access-control-allow-headers"]
    assert {"authorization", "content-type"} <= {name.strip() for name in allowed.split(",")}
    assert "access-control-allow-origin" not in preflight(live, "https://evil.example").headers


def test_with_keys_any_origin_may_be_allowed_and_needs_its_key(tmp_path: Path) -> None:
    with keyed_server(tmp_path, allowed_origin="*") as live:
        assert preflight(live, "https://any.example").status_code == 200
        answer = live.http.get("/v1/models", headers={"Origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        live.http.headers.pop("Authorization")
        assert live.http.get("/v1/models", headers={"Origin": "x://y"}).status_code == 401


def test_with_keys_every_name_of_the_server_is_answered(tmp_path: Path) -> None:
    with keyed_server(tmp_path, open_metrics=True) as live:
        host = {"Host": "llm.example"}
        assert live.http.get("/v1/models", headers=host).status_code == 200
        assert live.http.get("/health", headers=host).status_code == 200
        assert refused(
            live.http.get("/metrics", headers=host), "allowed_host"
        )  # no key protects it


@pytest.mark.parametrize("host", ["10.1.2.3:8000", "[2001:db8::1]", "localhost"])
def test_an_open_address_is_reached_by_any_of_its_addresses(tmp_path: Path, host: str) -> None:
    with live_server(tmp_path, host="0.0.0.0", allow_unauthenticated=True) as live:
        assert live.http.get("/v1/models", headers={"Host": host}).status_code == 200
        evil = live.http.get("/v1/models", headers={"Host": "evil.example"})
        assert refused(evil, "allowed_host")


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://a/b", "null"])
def test_an_origin_that_is_none_is_a_wrong_setting(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        Settings(model="x", store=Path("x"), allowed_origin=origin)


def test_without_keys_not_every_origin_can_be_allowed() -> None:
    settings = Settings(model="x", store=Path("x"), allowed_origin="*")
    with pytest.raises(SettingError, match="allowed_origin"):
        create_app(settings, text=byte_text())
