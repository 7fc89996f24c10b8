"""Usage: what the reports say is what the responses said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour
from http_support import BASE, LIMIT_SECONDS, Live, live_server, make_adapter, wait_until
from keys_support import COMPLETION, bearer, client_of, created, in_database, keyed_server, make_key
from text_support import byte_tokenizer

from quickchange_server.tenants.usage_log import UsageQuery, report
from quickchange_store.store import Store

FIGURES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed")
LABELS = {BASE: "base", "sql": "sql", "alias": "sql", "chat@1": "chat"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("usage")
    store = Store(folder)
    store.add("sql", make_adapter(1.0))
    store.add("chat", make_adapter(2.0))
    store.alias("alias", "sql")
    with keyed_server(folder) as live:
        yield live


def told(usage: dict[str, Any]) -> dict[str, int]:
    return {
        "requests": 1,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "failed": 0,
    }


def send(client: httpx.Client, draw: random.Random) -> tuple[str, dict[str, int]]:
    """Some request; the label of its adapter, and what its response says it took."""
    model = draw.choice(list(LABELS))
    body: dict[str, Any] = {
        "model": model,
        "prompt": ["x" * draw.randint(1, 9) for _ in range(draw.randint(1, 3))],
        "max_tokens": draw.randint(1, 9),
        "n": draw.randint(1, 2),
    }
    if draw.random() < 0.5:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return LABELS[model], told(response.json()["usage"])
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return LABELS[model], told(json.loads(events[-2])["usage"])


def added(told: list[tuple[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(FIGURES, 0))
    for label, figures in told:
        for name, value in figures.items():
            sums[label][name] += value
    return dict(sums)


def rows(client: httpx.Client, **params: str) -> list[dict[str, Any]]:
    response = client.get("/v1/usage", params=params)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def figures(row: dict[str, Any]) -> dict[str, int]:
    return {name: row[name] for name in FIGURES}


def test_usage_is_the_sum_of_what_the_responses_said(live: Live) -> None:
    key_id, secret = created(live, tenant="sums")

    def client_sends(seed: int) -> list[tuple[str, dict[str, int]]]:
        draw = random.Random(seed)
        with client_of(live, secret) as client:
            return [send(client, draw) for _ in range(12)]

    with ThreadPoolExecutor(6) as threads:
        said = [one for some in threads.map(client_sends, range(6)) for one in some]
    found = rows(live.http, tenant="sums")
    assert {row["adapter"]: figures(row) for row in found} == added(said)
    assert {(row["tenant"], row["key"]) for row in found} == {("sums", key_id)}


def test_replicas_on_one_database_add_up(live: Live) -> None:
    _, secret = created(live, tenant="replicas")
    draw = random.Random(1)
    said = []
    with live_server(Path(live.store.location), api_keys=True) as other:
        for server in (live, other):
            with client_of(server, secret) as client:
                said += [send(client, draw) for _ in range(10)]
        with client_of(other, secret) as client:
            found = rows(client)
    assert {row["adapter"]: figures(row) for row in found} == added(said)
    assert {row["adapter"]: figures(row) for row in rows(live.http, tenant="replicas")} == added(
        said
    )


def test_a_key_sees_its_own_tenant_s_usage_alone(live: Live) -> None:
    _, one = created(live, tenant="own-one")
    _, two = created(live, tenant="own-two")
    for secret in (one, two):
        with client_of(live, secret) as client:
            client.post("/v1/completions", json=COMPLETION).raise_for_status()
    with client_of(live, one) as client:
        assert {row["tenant"] for row in rows(client)} == {"own-one"}
        assert {row["tenant"] for row in rows(client, tenant="own-one")} == {"own-one"}
        for tenant in ("own-two", "absent"):
            refused = client.get("/v1/usage", params={"tenant": tenant})
            assert (refused.status_code, refused.json()["error"]["param"]) == (403, "tenant")
    assert {"own-one", "own-two"} <= {row["tenant"] for row in rows(live.http)}


def test_adapters_that_a_key_does_not_see_are_one_row_without_a_name(live: Live) -> None:
    _, wide = created(live, tenant="veiled")
    _, narrow = created(live, tenant="veiled", names=["nothing/*"])
    with client_of(live, wide) as client:
        for model in (BASE, "sql", "chat", "sql"):
            client.post("/v1/completions", json={**COMPLETION, "model": model}).raise_for_status()
        assert [row["adapter"] for row in rows(client, group="adapter")] == ["base", "chat", "sql"]
        whole = rows(client, group="")
    with client_of(live, narrow) as client:
        seen = rows(client, group="adapter")
        assert rows(client, group="") == whole
    assert [(row["adapter"], row["requests"]) for row in seen] == [("base", 1), ("-", 3)]
    assert {name: sum(row[name] for row in seen) for name in FIGURES} == whole[0]


def test_groups_choose_the_columns(live: Live) -> None:
    _, secret = created(live, tenant="groups")
    with client_of(live, secret) as client:
        for model in (BASE, "sql", "sql"):
            client.post("/v1/completions", json={**COMPLETION, "model": model}).raise_for_status()
        (whole,) = rows(client, group="")
        assert figures(whole) == whole
        assert whole["requests"] == 3
        by_adapter = {row["adapter"]: row["requests"] for row in rows(client, group="adapter")}
        assert by_adapter == {"base": 1, "sql": 2}
        (hourly,) = rows(client, group="hour,tenant")
        assert set(hourly) == {"hour", "tenant", *FIGURES}
        assert hourly["hour"] % 3600 == 0


def test_only_the_asked_hours_count(live: Live) -> None:
    _, secret = created(live, tenant="hours")
    with client_of(live, secret) as client:
        client.post("/v1/completions", json=COMPLETION).raise_for_status()
        now = int(time.time())
        assert rows(client, **{"from": str(now - 60), "to": str(now)})
        assert rows(client, **{"to": "2026-01-01", "from": "2025-01-01T00:00:00Z"}) == []
        assert rows(client, **{"from": str(now + 7200), "to": str(now + 9000)}) == []


@pytest.mark.parametrize(
    ("params", "param"),
    [({"from": "yesterday"}, "from"), ({"to": "9" * 12}, "to"), ({"group": "month"}, "group")],
)
def test_a_bad_parameter_is_named(live: Live, params: dict[str, str], param: str) -> None:
    response = live.http.get("/v1/usage", params=params)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_cancelled_request_counts_with_what_it_took(tmp_path: Path) -> None:
    with keyed_server(tmp_path, behaviour=Behaviour(step_seconds=0.02)) as live:
        _, secret = created(live, tenant="gone")
        body = {**COMPLETION, "max_tokens": 1000, "stream": True}
        with client_of(live, secret) as client:
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                for _ in range(6):
                    next(lines)
            wait_until(lambda: rows(client) != [], seconds=5)
            (row,) = rows(client)
    assert (row["requests"], row["failed"], row["prompt_tokens"]) == (1, 0, 5)
    assert 3 <= row["completion_tokens"] < 1000


def test_a_failed_request_is_counted_and_its_tokens_are_not(tmp_path: Path) -> None:
    digest = Store(tmp_path).add("bad", make_adapter(1.0)).digest
    with keyed_server(tmp_path, behaviour=Behaviour(missing=frozenset({digest}))) as live:
        _, secret = created(live, tenant="unlucky")
        with client_of(live, secret) as client:
            failed = client.post("/v1/completions", json={**COMPLETION, "model": "bad"})
            assert failed.status_code == 424
            wait_until(lambda: rows(client) != [], seconds=5)  # a failure's answer does not wait
            (row,) = rows(client, group="adapter")
    expected = {**dict.fromkeys(FIGURES, 0), "requests": 1, "failed": 1}
    assert row == {"adapter": "bad", **expected}


# --- the process is killed ----------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """A folder with a tokenizer and a configuration, and no weights."""
    byte_tokenizer().save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 8, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_was_answered_is_billed_after_a_kill_9(tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store(store).add("sql", make_adapter(1.0))
    _, secret = make_key(store, "killed")
    script = Path(__file__).parents[2] / "support" / "serve_fake.py"
    options = [f"model={write_model(tmp_path / 'tiny')}", f"store={store}", "port=0"]
    process = subprocess.Popen(
        [sys.executable, str(script), "0", "", *options, "api_keys=true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    said: list[dict[str, int]] = []
    threads_count = 4
    body = {**COMPLETION, "model": "sql"}

    def client_sends() -> None:
        with httpx.Client(base_url=url, headers=bearer(secret), timeout=LIMIT_SECONDS) as client:
            try:
                while True:
                    response = client.post("/v1/completions", json=body)
                    assert response.status_code == 200, response.text
                    said.append(told(response.json()["usage"]))
            except httpx.TransportError:
                return

    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        threads = [threading.Thread(target=client_sends) for _ in range(threads_count)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(said) >= 50)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT_SECONDS)
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    wanted = UsageQuery(0, 10**11, "killed", ("adapter",))
    (row,) = in_database(store, lambda connection: report(connection, wanted))
    assert row["adapter"] == "sql"
    # each client had at most one request under way, whose answer it did not get
    assert len(said) <= row["requests"] <= len(said) + threads_count
    each = said[0]
    assert all(figures == each for figures in said)
    for name in ("prompt_tokens", "completion_tokens"):
        assert row[name] == row["requests"] * each[name]
