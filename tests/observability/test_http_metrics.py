"""Responses are counted by route template, method and status: nothing that clients make up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import BASE, Live, live_server, make_adapter
from prometheus_client.parser import text_string_to_metric_families

from quickchange_store.store import Store

NAME = "quickchange_http_responses_total"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    with live_server(tmp_path, max_request_bytes=1024) as live:
        yield live


def counted(live: Live) -> dict[tuple[str, str, str], float]:
    """Counts by (method, route, status), the scrapes' and health checks' own left out."""
    families = text_string_to_metric_families(live.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == NAME]
    counts = {(s.labels["method"], s.labels["route"], s.labels["status"]): s.value for s in samples}
    return {key: count for key, count in counts.items() if key[1] not in ("/metrics", "/health")}


def test_a_route_is_counted_under_its_template(server: Live) -> None:
    Store(server.store.location).add("orders", make_adapter(1.0))
    for name in ("orders", "nobody", "nothing"):
        server.http.get(f"/v1/adapters/{name}")
    route = "/v1/adapters/{reference:path}"
    assert counted(server) == {("GET", route, "200"): 1, ("GET", route, "404"): 2}


def test_answers_streamed_and_whole_and_refusals_are_counted_by_status(server: Live) -> None:
    body = {"model": BASE, "prompt": "ab", "max_tokens": 2}
    server.post("/v1/completions", body)
    server.events("/v1/completions", body)
    server.post("/v1/completions", {**body, "temperature": 9})
    route = "/v1/completions"
    assert counted(server) == {("POST", route, "200"): 2, ("POST", route, "400"): 1}


def test_what_no_route_takes_shares_one_value(server: Live) -> None:
    for path in ("/a", "/b", "/.env"):
        server.http.get(path)
    server.http.request("BREW", "/pot")
    server.post("/v1/completions", {"prompt": "x" * 2000})
    assert counted(server) == {
        ("GET", "none", "404"): 3,
        ("other", "none", "404"): 1,
        ("POST", "none", "413"): 1,
    }
