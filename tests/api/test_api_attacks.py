"""Bodies made to be slow: each is answered with 400, and health checks are answered meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_support import BASE, Live, live_server

from quickchange_server.api.json_bodies import MAX_DEPTH, MAX_FIELDS, MAX_VALUES

PROMPTLY = 1.0  # seconds; alone on a machine it is under 0.1, here other tests run beside it
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def of(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, **fields}).encode()


def said(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a", **fields}]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ATTACKS = {
    "empty messages": (CHAT, of(messages=[{}] * 400_000)),
    "empty adapters": (COMPLETION, of(prompt="x", adapters=[{}] * 500_000)),
    "many messages": (CHAT, of(messages=said() * 300_000)),
    "messages within bounds": (CHAT, of(messages=[{}] * (MAX_FIELDS - 10))),
    "a long prompt": (COMPLETION, of(prompt="word " * 3_000_000)),
    "a long chat": (CHAT, of(messages=said(content="word " * 3_000_000))),
    "a long LoRAX prompt": ("/generate", json.dumps({"inputs": "word " * 3_000_000}).encode()),
    "a long text to count": ("/tokenize", of(prompt="word " * 3_000_000)),
    "a long chat to count": ("/tokenize", of(messages=said(content="word " * 3_000_000))),
    "ids to decode": ("/detokenize", of(tokens=[5] * 900_000)),
    "a long input": ("/v1/embeddings", of(input="word " * 3_000_000)),
    "ids": (COMPLETION, of(prompt=[1] * 900_000)),
    "too many ids": (COMPLETION, of(prompt=[1] * 3_000_000)),
    "deep lists": (COMPLETION, b"[" * 1_000_000),
    "deep objects": (COMPLETION, b'{"a":' * 200_000),
    "many keys": (COMPLETION, b"{" + b",".join(b'"k%d":1' % i for i in range(10**6)) + b"}"),
    "keys within bounds": (COMPLETION, of(**{f"k{i}": 1 for i in range(MAX_FIELDS - 10)})),
    "one key again": (COMPLETION, b"{" + b",".join([b'"model":"x"'] * (MAX_FIELDS - 10)) + b"}"),
    "digits": (COMPLETION, b'{"model":"x","prompt":"a","max_tokens":' + b"1" * 10**6 + b"}"),
    "metadata": (COMPLETION, of(prompt="a", metadata={f"k{i}": 1 for i in range(40_000)})),
    "biases": (COMPLETION, of(prompt="a", logit_bias={str(i): 1 for i in range(40_000)})),
    "stops": (COMPLETION, of(prompt="a", stop=["a"] * 900_000)),
    "stop ids": (COMPLETION, of(prompt="a", stop_token_ids=["a"] * 900_000)),
    "quotes": (COMPLETION, of(prompt=[""] * 4_000_000)),
    "parts": (CHAT, of(messages=said(content=[{"type": "text", "text": "a"}] * 15_000))),
    "calls": (CHAT, of(messages=[{"role": "assistant", "tool_calls": [CALL] * 129}] * 50)),
    "a schema": (CHAT, of(messages=said(), guided_json={"enum": ["a"] * 900_000})),
    "a written schema": (CHAT, of(messages=said(), guided_json="[" + "[]," * 10**6 + "1]")),
    "choices": (CHAT, of(messages=said(), guided_choice=["a"] * 900_000)),
    "a name": (COMPLETION, json.dumps({"model": "x" * 10**7, "prompt": "a"}).encode()),
    "outcomes": ("/v1/experiments/x/outcomes", json.dumps({"outcomes": [{}] * 40_000}).encode()),
    "globs": ("/v1/keys", json.dumps({"tenant": "a", "names": ["*"] * 900_000}).encode()),
    "no UTF-8": (COMPLETION, '{"model": "\\""}'.encode("utf-16")),
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("attacks"), max_model_len=1024) as live:
        yield live


@pytest.mark.parametrize("name", ATTACKS)
def test_a_large_body_is_refused_and_stalls_nobody(live: Live, name: str) -> None:
    path, content = ATTACKS[name]
    answers: list[httpx.Response] = []

    def send() -> None:
        headers = {"Content-Type": "application/json"}
        answers.append(httpx.post(live.url + path, content=content, headers=headers, timeout=60))

    sender, slowest = threading.Thread(target=send), 0.0
    sender.start()
    while sender.is_alive():
        began = time.monotonic()
        live.http.get("/health")
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.01)
    assert answers[0].status_code in (400, 422), answers[0].text[:200]
    assert len(answers[0].content) < 5000
    assert slowest < PROMPTLY


def chunks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[i : i + size] for i in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_stands_in_strings_is_not_counted_however_it_arrives(live: Live, size: int) -> None:
    text = '\\"[{' * 300 + "\\\\"
    content = json.dumps({"model": BASE, "prompt": text, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    answer = live.http.post("/tokenize", content=chunks(content, size), headers=headers)
    refused = live.http.post(COMPLETION, content=chunks(b"[" * 400, size), headers=headers)
    assert answer.json()["error"]["param"] == "max_tokens"  # read as it was meant
    assert f"{MAX_DEPTH} objects and lists within each other" in refused.json()["error"]["message"]


def test_as_many_ids_as_are_read_are_read(live: Live) -> None:
    content = of(input=[[1] * 1000] * (MAX_VALUES // 1001))
    answer = live.http.post(
        "/v1/embeddings", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("parts", [100_000])
def test_an_upload_of_many_fields_is_refused(live: Live, parts: int) -> None:
    part = '--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\nb\r\n'
    content = "".join(part % i for i in range(parts)) + "--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = live.http.post("/v1/adapters", content=content, headers=headers)
    assert answer.status_code == 400
