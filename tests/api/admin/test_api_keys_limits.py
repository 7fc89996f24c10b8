"""Limits of API keys over HTTP."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, expected_text, wait_until
from keys_support import COMPLETION, client_of, created, keyed_server

PROMPT_TOKENS = 5  # of "Hello", in bytes


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with keyed_server(
        tmp_path_factory.mktemp("limits"), behaviour=Behaviour(step_seconds=0.02)
    ) as live:
        yield live


def complete(client: httpx.Client, **changes: object) -> httpx.Response:
    return client.post("/v1/completions", json={**COMPLETION, **changes})


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()["error"]
    return error


def metric(live: Live, line: str) -> float:
    found = [li for li in live.http.get("/metrics").text.splitlines() if li.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def test_requests_beyond_the_minute_s_limit_are_429_with_retry_after(live: Live) -> None:
    _, secret = created(live, tenant="rpm", limits={"requests_per_minute": 3})
    with client_of(live, secret) as client:
        assert [complete(client).status_code for _ in range(3)] == [200] * 3
        response = complete(client)
        assert client.get("/v1/models").status_code == 200
    error = error_of(response, 429)
    assert "requests_per_minute, 3" in error["message"]
    assert error["code"] == "rate_limit_exceeded"
    assert 50 <= int(response.headers["retry-after"]) <= 60
    labels = 'tenant="rpm"'
    assert metric(live, f'quickchange_tenant_limited_total{{limit="requests_per_minute",{labels}}}')
    assert metric(live, f'quickchange_tenant_requests_total{{outcome="refused",{labels}}}') == 1
    assert metric(live, f'quickchange_tenant_requests_total{{outcome="length",{labels}}}') == 3


def test_a_stream_is_refused_before_it_begins(live: Live) -> None:
    _, secret = created(live, limits={"requests_per_minute": 1})
    with client_of(live, secret) as client:
        complete(client).raise_for_status()
        error_of(complete(client, stream=True), 429)


def test_tokens_are_charged_ahead_and_what_is_not_used_comes_back(live: Live) -> None:
    _, secret = created(live, limits={"tokens_per_minute": 130})
    stop = expected_text(1, PROMPT_TOKENS, 1)
    with client_of(live, secret) as client:
        for _ in range(5):  # each may take 95 and takes 6
            complete(client, max_tokens=90, stop=stop).raise_for_status()
        error = error_of(complete(client, max_tokens=96), 429)
        assert "tokens_per_minute, 130" in error["message"]
        complete(client, max_tokens=95).raise_for_status()
        error_of(complete(client, max_tokens=1), 429)


def test_no_more_requests_run_at_once_than_the_limit(live: Live) -> None:
    _, secret = created(live, limits={"concurrent_requests": 2})
    begun = threading.Barrier(8)

    def send(_: int) -> int:
        with client_of(live, secret) as client:
            begun.wait()
            return complete(client, max_tokens=60).status_code

    with ThreadPoolExecutor(8) as threads:
        assert Counter(threads.map(send, range(8))) == {200: 2, 429: 6}
    with client_of(live, secret) as client:
        complete(client).raise_for_status()


def test_a_client_that_goes_away_frees_its_place(live: Live) -> None:
    _, secret = created(live, limits={"concurrent_requests": 1})
    body = {**COMPLETION, "max_tokens": 1000, "stream": True}
    with client_of(live, secret) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            error_of(complete(client), 429)
        wait_until(lambda: complete(client).status_code == 200, seconds=5)


def test_requests_that_are_refused_elsewhere_are_not_charged(live: Live) -> None:
    _, secret = created(live, limits={"requests_per_minute": 1})
    with client_of(live, secret) as client:
        assert complete(client, model="absent").status_code == 404
        assert complete(client, temperature=9).status_code == 400
        assert complete(client, max_tokens=10**6).status_code == 400
        assert complete(client).status_code == 200


def test_what_a_full_queue_refuses_is_neither_charged_nor_billed(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.02)
    with keyed_server(tmp_path, behaviour=behaviour, max_queue=1) as live:
        _, secret = created(live, limits={"requests_per_minute": 2, "concurrent_requests": 2})
        body = {**COMPLETION, "max_tokens": 1000, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            with client_of(live, secret) as client:
                for _ in range(4):
                    assert error_of(complete(client), 429)["code"] == "queue_full"
        with client_of(live, secret) as client:
            wait_until(lambda: complete(client).status_code == 200, seconds=5)
            (row,) = client.get("/v1/usage", params={"group": ""}).json()["data"]
    assert row["requests"] == 1


@pytest.mark.parametrize(
    ("limits", "changes", "named"),
    [
        ({"max_prompt_tokens": 4}, {}, "max_prompt_tokens is 4"),
        ({"max_prompt_tokens": 9}, {"prompt": ["Hello", "Hello"]}, "max_prompt_tokens is 9"),
        ({"max_new_tokens": 3}, {}, "max_new_tokens is 3"),
        ({"max_new_tokens": 7}, {"n": 2}, "max_new_tokens is 7"),
        ({"tokens_per_minute": 8}, {}, "more than this API key may take in a minute, 8"),
    ],
)
def test_a_request_that_is_too_large_is_400_and_names_the_limit(
    live: Live, limits: dict[str, int], changes: dict[str, object], named: str
) -> None:
    _, secret = created(live, limits=limits)
    with client_of(live, secret) as client:
        response = complete(client, **changes)
    assert named in error_of(response, 400)["message"]
    assert "retry-after" not in response.headers


@pytest.mark.parametrize(("n", "share"), [(1, 6), (2, 3), (4, 1)])
def test_the_limit_of_new_tokens_is_the_default_shared_by_the_choices(
    live: Live, n: int, share: int
) -> None:
    _, secret = created(live, limits={"max_new_tokens": 6})
    body = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "seed": 1, "n": n}
    with client_of(live, secret) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.json()["usage"]["completion_tokens"] == n * share


def test_a_changed_limit_acts_on_what_was_taken_before(live: Live) -> None:
    key_id, secret = created(live, limits={"requests_per_minute": 2})
    with client_of(live, secret) as client:
        complete(client).raise_for_status()
        live.http.patch(f"/v1/keys/{key_id}", json={"limits": {"requests_per_minute": 1}})
        error_of(complete(client), 429)
        live.http.patch(f"/v1/keys/{key_id}", json={"limits": None})
        complete(client).raise_for_status()
