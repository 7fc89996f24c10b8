"""x-request-id in and out, in log lines and errors; the digests of what answered."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.observability.naming import request_ids
from quickchange_server.observability.naming.request_ids import FORMAT, _Requests
from quickchange_store.store import Store

COMPLETION = {"model": BASE, "prompt": "ab", "max_tokens": 2}
CHAT = {"model": "orders", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
SENT = {"x-request-id": "edge:7f3a.b-c_d"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    for number, name in enumerate(("orders", "tickets", "gone")):
        store.add(name, make_adapter(1.0 + number))
    missing = frozenset({store.resolve("gone").digest})
    with live_server(folder, Behaviour(missing=missing)) as served:
        yield served


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/v1/models", None, 200),
        ("POST", "/v1/completions", COMPLETION, 200),
        ("POST", "/v1/completions", {**COMPLETION, "stream": True}, 200),
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/embeddings", {"model": BASE, "input": "a"}, 200),
        ("POST", "/tokenize", {"model": BASE, "prompt": "a"}, 200),
        ("POST", "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}, 200),
        ("POST", "/v1/completions", {"model": "nobody", "prompt": "a"}, 404),
        ("POST", "/v1/completions", {**COMPLETION, "model": "gone"}, 424),
        ("POST", "/v1/completions", {"prompt": 1}, 400),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/v1/models", None, 405),
    ],
)
def test_every_answer_has_the_requests_own_id(
    live: Live, method: str, path: str, body: object, status: int
) -> None:
    answer = live.http.request(method, path, json=body, headers=SENT)
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == [SENT["x-request-id"]]


PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")
IDS = st.one_of(
    st.text(PRINTABLE, max_size=200).map(str.strip),
    st.from_regex(r"[A-Za-z0-9._:-]{1,140}", fullmatch=True),
)


@settings(deadline=None, max_examples=80)
@given(sent=IDS)
def test_an_id_is_kept_if_it_is_short_and_plain_else_drawn(live: Live, sent: str) -> None:
    headers = [(b"x-request-id", sent.encode("latin-1"))]
    kept = live.http.get("/health/live", headers=headers).headers["x-request-id"]
    if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", sent):
        assert kept == sent
    else:
        assert re.fullmatch(r"[0-9a-f]{32}", kept)


def test_an_unforeseen_errors_message_has_the_id(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("quickchange_server.adapter_registry.resolver.Catalog.select", fail)
    answer = live.http.post("/v1/completions", json=COMPLETION, headers=SENT)
    assert answer.status_code == 500
    assert SENT["x-request-id"] in answer.json()["error"]["message"]


def lines_of(*messages: str) -> list[str]:
    made = []
    for message in messages:
        record = logging.LogRecord("name", logging.INFO, "", 0, message, None, None)
        _Requests().filter(record)
        made.append(logging.Formatter(FORMAT).format(record))
    return made


def test_log_lines_of_a_requests_tasks_have_its_id_and_no_others() -> None:
    async def request(name: str) -> list[str]:
        request_ids.arrive(name)
        await asyncio.sleep(0)
        return await asyncio.create_task(asyncio.to_thread(lines_of, "said"))

    async def both() -> list[list[str]]:
        return await asyncio.gather(request("a"), request("b"))

    assert asyncio.run(both()) == [
        ["INFO name: said (request a)"],
        ["INFO name: said (request b)"],
    ]
    assert lines_of("said") == ["INFO name: said"]


def test_what_adapters_answer_tells_their_digests(live: Live) -> None:
    orders, tickets = (live.store.resolve(name).digest for name in ("orders", "tickets"))
    name = "x-quickchange-adapter"
    assert name not in live.post("/v1/completions", COMPLETION).headers
    for path, body in (
        ("/v1/completions", {**COMPLETION, "model": "orders"}),
        ("/v1/completions", {**COMPLETION, "model": "orders", "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/embeddings", {"model": "orders", "input": "a"}),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "orders"}}),
    ):
        assert live.post(path, body).headers[name] == orders, path
    composed = {**COMPLETION, "adapters": [{"id": "orders"}, {"id": "tickets"}]}
    told = live.post("/v1/completions", composed).headers[name]
    assert told == ",".join(sorted([orders, tickets]))


def test_a_shadows_adapter_is_not_the_answers(live: Live) -> None:
    experiment = {
        "name": "tone",
        "variants": [{"name": "a", "model": "orders"}, {"name": "b", "model": "orders"}],
        "shadows": [{"name": "dark", "model": "tickets"}],
    }
    assert live.post("/v1/experiments", experiment).status_code == 201
    answer = live.post("/v1/completions", {**COMPLETION, "model": "tone"})
    assert answer.headers["x-quickchange-adapter"] == live.store.resolve("orders").digest
