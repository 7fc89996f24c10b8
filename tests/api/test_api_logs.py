"""What clients send is in no line of the server's log, nor in a span."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import Live, make_adapter
from keys_support import COMPLETION, client_of, in_database, keyed_server, make_key
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from text_support import byte_text

from quickchange_store.store import Store

CANARY = "canary-7f3a"
USER = "user-of-the-canary"
TOKEN = "hub-token-of-the-canary"
CHAT = {"model": "tiny/base", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}
REQUESTS: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {**COMPLETION, "prompt": CANARY, "user": USER}, 200),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY, "metadata": {"account": USER}}, 200),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY, "model": "orders", "user": USER}, 200),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY, "model": "gone"}, 424),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY * 4000}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY, "guided_regex": CANARY + "("}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": {"a": CANARY}}, 400),
    ("/v1/chat/completions", CHAT, 200),
    ("/v1/embeddings", {"model": "tiny/base", "input": CANARY}, 200),
    ("/embed", {"inputs": CANARY, "parameters": {"api_token": TOKEN}}, 200),
    ("/chat_tokenize", CHAT, 200),
    ("/classify", {"model": "tiny/base", "input": CANARY}, 400),
    ("/rerank", {"model": "tiny/base", "query": CANARY, "documents": [CANARY]}, 200),
    ("/score", {"model": "tiny/base", "text_1": CANARY, "text_2": [{"image": CANARY}]}, 400),
    ("/generate", {"inputs": CANARY, "parameters": {"api_token": TOKEN, "user": USER}}, 200),
    ("/v1/experiments/orders/outcomes", {"unit": USER, "name": "liked", "value": True}, 201),
    ("/v1/experiments/orders/outcomes", {"unit": CANARY, "name": "liked", "value": True}, 404),
]
EXPERIMENT = {
    "name": "orders",
    "variants": [{"name": "now", "model": "tiny/base"}, {"name": "new", "model": "tiny/base"}],
    "shadows": [{"name": "dark", "model": "gone"}],
    "metrics": [{"name": "liked", "kind": "flag"}],
}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Live, str]]:
    store = Store(tmp_path)
    store.add("gone", make_adapter(1.0))
    _, secret = make_key(tmp_path, "acme", "infer", ("*",))
    behaviour = Behaviour(missing=frozenset({store.resolve("gone").digest}))
    with keyed_server(tmp_path, behaviour=behaviour, text=byte_text()) as server:
        assert server.post("/v1/experiments", EXPERIMENT).status_code == 201
        yield server, secret


def test_logs_have_no_prompt_user_key_or_token(
    live: tuple[Live, str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server, secret = live
    caplog.set_level(logging.INFO)  # as `quickchange serve` logs
    logging.getLogger("quickchange_server").info("watched")
    with client_of(server, secret) as client:
        for path, body, status in REQUESTS:
            response = client.post(path, json=body)
            assert response.status_code == status, (path, body, response.text)
    with client_of(server, secret[:-1] + ("1" if secret.endswith("0") else "0")) as stranger:
        refused = stranger.post("/v1/completions", json=COMPLETION)
        assert refused.status_code == 401
        assert secret[:-1] not in refused.text
    server.end()
    server.thread.join(30)
    out, err = capfd.readouterr()
    said = "\n".join([caplog.text, out, err])
    assert "watched" in said
    for hidden in (CANARY, USER, TOKEN, secret):
        assert hidden not in said


def test_errors_of_the_database_have_no_values(tmp_path: Path) -> None:
    def change(connection: Connection) -> None:
        connection.execute(text("INSERT INTO nowhere VALUES (:value)"), {"value": CANARY})

    with pytest.raises(DBAPIError, match="nowhere") as caught:
        in_database(tmp_path, change)
    assert CANARY not in str(caught.value)
