"""Limits of API keys over two servers with one store, one database and one counter of limits."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import httpx
import pytest
from fake_engine import Behaviour
from http_support import Live, live_server, wait_until
from keys_support import COMPLETION, bearer, client_of, created, make_key
from shared_counter import Passage, Place, Wire

PROMPT_TOKENS = 5  # of "Hello", in bytes
SEEN_SECONDS = 2.0  # what one server changes in the database, the other has read by then


@dataclass
class Pair:
    """Two servers, and where their counter lives."""

    one: Live
    other: Live
    place: Place

    def key(self, **limits: int) -> str:
        """The secret of a new key that both servers know."""
        _, secret = created(self.one, limits=limits)
        for live in (self.one, self.other):
            with client_of(live, secret) as client:
                wait_until(lambda: client.get("/v1/models").status_code == 200, SEEN_SECONDS)
        return secret


@contextmanager
def pair_of(folder: Path) -> Iterator[Pair]:
    _, secret = make_key(folder, "operator", "admin")
    place = Place()
    place.begin()

    def wire() -> Wire:
        return Wire(place, repeat(Passage(there=0.005, back=0.005)))

    behaviour = Behaviour(step_seconds=0.01)
    with (
        live_server(folder, behaviour, api_keys=True, limit_counter=wire()) as one,
        live_server(folder, behaviour, api_keys=True, limit_counter=wire()) as other,
    ):
        for live in (one, other):
            live.http.headers.update(bearer(secret))
        yield Pair(one, other, place)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair_of(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


def complete(client: httpx.Client, **changes: object) -> httpx.Response:
    return client.post("/v1/completions", json={**COMPLETION, **changes})


def spent(live: Live, secret: str, requests: int, tokens: int) -> int:
    """Tokens that the answers of so many requests took, by their own `usage`."""
    total = 0
    with client_of(live, secret) as client:
        for _ in range(requests):
            response = complete(client, max_tokens=tokens - PROMPT_TOKENS)
            if response.status_code == 200:
                total += response.json()["usage"]["total_tokens"]
            else:
                assert response.status_code == 429
                assert int(response.headers["retry-after"]) in range(1, 61)
    return total


def test_600_tokens_a_minute_through_two_servers_at_once_are_600(pair: Pair) -> None:
    secret = pair.key(tokens_per_minute=600)
    with ThreadPoolExecutor(4) as threads:
        servers = [pair.one, pair.other] * 2
        totals = list(threads.map(lambda live: spent(live, secret, 15, 20), servers))
    assert sum(totals) == 600
    assert sum(totals[::2]) > 0
    assert sum(totals[1::2]) > 0


def test_no_more_requests_run_at_once_on_both_than_the_limit(pair: Pair) -> None:
    secret = pair.key(concurrent_requests=3)
    begun = threading.Barrier(8)

    def send(index: int) -> int:
        with client_of((pair.one, pair.other)[index % 2], secret) as client:
            begun.wait()
            return complete(client, max_tokens=100).status_code

    with ThreadPoolExecutor(8) as threads:
        assert Counter(threads.map(send, range(8))) == {200: 3, 429: 5}


def test_a_stream_whose_client_leaves_one_server_frees_its_place_on_the_other(pair: Pair) -> None:
    secret = pair.key(concurrent_requests=1)
    body = {**COMPLETION, "max_tokens": 1000, "stream": True}
    with client_of(pair.one, secret) as one, client_of(pair.other, secret) as other:
        with one.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            refused = complete(other)
            assert refused.status_code == 429
            assert "concurrent_requests, 1, is reached" in refused.json()["error"]["message"]
        wait_until(lambda: complete(other).status_code == 200, seconds=5)


def alone(live: Live) -> float:
    text = live.http.get("/metrics").text
    (value,) = re.findall(r"^quickchange_limits_counted_alone_total (\S+)$", text, re.M)
    return float(value)


def test_without_the_counter_each_server_lets_the_limit_through_and_then_they_count_together(
    pair: Pair,
) -> None:
    secret = pair.key(requests_per_minute=2)
    before = alone(pair.one)
    pair.place.counter = None
    with client_of(pair.one, secret) as one, client_of(pair.other, secret) as other:
        for client in (one, other):
            began = time.monotonic()
            assert [complete(client).status_code for _ in range(3)] == [200, 200, 429]
            assert time.monotonic() - began < 5
        assert alone(pair.one) == before + 3
        pair.place.begin()
        time.sleep(2.5)
        assert [complete(client).status_code for client in (one, other)] == [429, 429]
        assert alone(pair.one) == before + 3


def test_a_key_revoked_through_one_server_ends_on_the_other_within_two_seconds(pair: Pair) -> None:
    key_id, secret = created(pair.one)
    with client_of(pair.other, secret) as client:
        wait_until(lambda: complete(client).status_code == 200, SEEN_SECONDS)
        assert pair.one.http.delete(f"/v1/keys/{key_id}").status_code == 200
        wait_until(lambda: complete(client).status_code == 401, SEEN_SECONDS)


def test_usage_of_both_servers_is_one_figure_on_each(pair: Pair) -> None:
    secret = pair.key(requests_per_minute=100)
    with client_of(pair.one, secret) as one, client_of(pair.other, secret) as other:
        before = one.get("/v1/usage", params={"group": ""}).json()["data"]
        asked = [complete(client).json()["usage"]["total_tokens"] for client in (one, other, one)]
        rows = [c.get("/v1/usage", params={"group": ""}).json()["data"] for c in (one, other)]
    assert rows[0] == rows[1]
    (now,), was = rows[0], before[0] if before else Counter()
    assert now["requests"] - was["requests"] == 3
    figures = ("prompt_tokens", "completion_tokens")
    assert sum(now[name] - was[name] for name in figures) == sum(asked)
