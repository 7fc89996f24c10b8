"""Requests to a server whose clients ask by a proxy's path, with that path and without."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from http_support import BASE, Live, live_server
from pydantic import ValidationError

from quickchange_server.config import Settings


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("rooted"), root_path="/team/llm") as live:
        yield live


@pytest.mark.parametrize("root", ["", "/team/llm"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/", f"/v1/models/{BASE}", "/health", "/metrics", "/docs"]
)
def test_the_root_path_counts_for_nothing(live: Live, root: str, path: str) -> None:
    assert live.http.get(root + path).status_code == 200


@pytest.mark.parametrize("path", ["/team/llmx/health", "/team/health", "/team/llm/team/llm/health"])
def test_another_beginning_is_no_path(live: Live, path: str) -> None:
    assert live.http.get(path).status_code == 404


@pytest.mark.parametrize("root", ["", "/team/llm"])
def test_a_completion_its_errors_and_methods_are_answered(live: Live, root: str) -> None:
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 2}
    assert live.post(f"{root}/v1/completions", body).status_code == 200
    lorax = live.post(f"{root}/generate", {"inputs": 3})
    assert (lorax.status_code, lorax.json()["error_type"]) == (422, "validation")
    messages = live.post(f"{root}/v1/messages", {})
    assert (messages.status_code, messages.json()["type"]) == (400, "error")
    invoked = live.post(f"{root}/invocations", body)
    assert invoked.json()["object"] == "text_completion"
    wrong = live.http.get(f"{root}/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, OPTIONS")


def test_keys_are_asked_for_with_the_root_path_too(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("keyed")
    with live_server(folder, root_path="/llm", api_keys=True) as live:
        assert live.http.get("/llm/v1/models").status_code == 401
        assert live.http.get("/llm/health").status_code == 200
        assert live.http.get("/llm/page/main.js").status_code == 200


def test_the_documents_links_begin_with_the_root_path(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert document["servers"] == [{"url": "/team/llm"}]
    assert "/v1/models" in document["paths"]
    for page in ("/docs", "/redoc"):
        assert "/team/llm/openapi.json" in live.http.get(page).text


@pytest.mark.parametrize("found_at", ["/", "/team/llm", "/team/llm/"])
def test_the_pages_links_begin_with_the_root_path(live: Live, found_at: str) -> None:
    page = live.http.get(found_at)
    assert re.findall(r'<base href="([^"]*)" />', page.text) == ["/team/llm/"]
    assert page.text.index("<base") < page.text.index("page/main.js")
    assert "base-uri 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/v1/models", "/v1/health"])
def test_a_root_path_that_routes_begin_with_too_hides_none(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    with live_server(tmp_path_factory.mktemp("v1"), root_path="/v1/") as live:
        assert live.http.get(path).status_code == 200


def test_without_a_root_path_links_count_from_where_the_page_is(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with live_server(tmp_path_factory.mktemp("plain")) as live:
        assert "<base" not in live.http.get("/").text
        assert "servers" not in live.http.get("/openapi.json").json()
        assert "'/openapi.json'" in live.http.get("/docs").text


@pytest.mark.parametrize("path", ["llm", "/a?b", "/a b", "//host", '/"', "/ä", "http://host/a"])
def test_what_begins_no_path_is_refused_by_name(path: str) -> None:
    with pytest.raises(ValidationError, match="root_path") as raised:
        Settings(model="m", store="s", root_path=path)
    assert "/llm" in str(raised.value)


@pytest.mark.parametrize(("given", "taken"), [("/", ""), ("", ""), ("/a/b/", "/a/b")])
def test_a_slash_at_its_end_counts_for_nothing(given: str, taken: str) -> None:
    assert Settings(model="m", store="s", root_path=given).root_path == taken
