"""The same application over engines elsewhere: answers over lost replicas, states and adapters."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_engine import ADAPTER_BYTES
from fake_replicas import FakeReplicas, Fate, hurried
from http_support import BASE, Live, expected_text, live_server, make_adapter, wait_until

from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.protocol import Component, Forget, Pin, Prefetch

PROMPT = "Hello"


@pytest.fixture
def calls() -> FakeReplicas:
    return FakeReplicas()


@pytest.fixture
def live(calls: FakeReplicas, tmp_path: Path) -> Iterator[Live]:
    with hurried(), live_server(tmp_path, engines=partial(RemoteEngines, calls=calls)) as live:
        yield live


def befall(calls: FakeReplicas, *fates: Fate) -> None:
    """Let this happen to each request's first attempts."""
    calls.fates = defaultdict(partial(deque, fates))


def test_streams_and_answers_are_whole_over_lost_replicas(live: Live, calls: FakeReplicas) -> None:
    digest = live.store.add("sql", make_adapter(1.0)).digest
    befall(calls, Fate("kill", 2), Fate("give back", 1), Fate("loss", 0), Fate("early end", 9))
    body = {"model": "sql", "prompt": PROMPT, "seed": 3, "max_tokens": 60}
    text = expected_text(3, len(PROMPT), 60, Component(digest))
    *events, done = live.events("/v1/completions", body)
    assert done == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == text
    whole = live.post("/v1/completions", body).json()
    assert whole["choices"][0]["text"] == text
    assert whole["usage"]["completion_tokens"] == 60
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len(calls.submits) >= 8
    assert live.services.client.in_flight == 0


def test_a_replicas_refusal_is_the_answer(live: Live, calls: FakeReplicas) -> None:
    befall(calls, Fate("refusal", 0))
    answer = live.post("/v1/completions", {"model": BASE, "prompt": PROMPT})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"


def test_readiness_follows_the_replicas(live: Live, calls: FakeReplicas) -> None:
    for replica in calls.replicas:
        replica.state = "dead"
    wait_until(lambda: live.http.get("/health").json()["state"] == "restarting")
    wait_until(lambda: live.http.get("/health").status_code == 503)
    assert live.http.get("/health/live").status_code == 503
    answer = live.post("/v1/completions", {"model": BASE, "prompt": PROMPT})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    calls.replicas[0].state = "ready"
    wait_until(lambda: live.http.get("/health").status_code == 200)


def test_adapters_are_shown_pinned_loaded_and_dropped_on_the_replicas(
    live: Live, calls: FakeReplicas
) -> None:
    digest = live.store.add("sql", make_adapter(1.0)).digest
    calls.replicas[0].residency = {digest: Residence("device", ADAPTER_BYTES, False)}
    assert live.http.post("/v1/adapters/sql/pin").status_code == 202
    assert live.http.post("/v1/adapters/sql/prefetch").status_code == 202
    pinned = {"tier": "device", "bytes": ADAPTER_BYTES, "pinned": True}
    wait_until(lambda: live.http.get("/v1/adapters/sql").json()["residency"] == pinned)
    live.http.delete("/v1/adapters/sql").raise_for_status()
    wait_until(lambda: Forget(digest) in calls.commands)
    kept = [c for c in calls.commands if not isinstance(c, Pin)]
    assert kept == [Prefetch(digest), Forget(digest)]
    assert Pin(digest, True) in calls.commands
    assert not calls.pins
