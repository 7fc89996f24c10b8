"""The streaming client and its dialects, against a tiny server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from quickchange_bench.bench_results import ClientCompletion
from quickchange_bench.load.load_client import (
    Client,
    DialectName,
    ServedNames,
    check_url,
    request_body,
)
from quickchange_bench.load.workload import Request

TARGET = ServedNames("base", ("a", "b", "c"))


def complete(
    url: str, prompt: str, adapter: int | None, target: ServedNames = TARGET
) -> ClientCompletion:
    async def run() -> ClientCompletion:
        async with Client(url, target) as client:
            return await client.complete(Request(3, prompt, 5, adapter))

    return asyncio.run(run())


def test_a_completion_is_timed_and_counted(fake_server: Any) -> None:
    done = complete(fake_server.url, "hello", 1)
    assert done.error is None
    assert done.text == " 0 1 2 3 4"
    assert (done.index, done.adapter, done.prompt_tokens, done.output_tokens) == (3, 1, 7, 5)
    assert len(done.gaps) == 4
    assert done.ttft is not None
    assert 0 < done.ttft <= done.seconds
    assert all(gap >= 0 for gap in done.gaps)


def test_the_body_asks_for_a_greedy_stream_of_a_fixed_length(fake_server: Any) -> None:
    complete(fake_server.url, "hello", 1)
    assert fake_server.bodies == [
        {
            "model": "b",
            "prompt": "hello",
            "max_tokens": 5,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_a_refusal_is_an_error_with_the_servers_words(fake_server: Any) -> None:
    done = complete(fake_server.url, "hello", None, ServedNames("unknown"))
    assert done.error is not None
    assert "404" in done.error
    assert "no such model" in done.error


def test_an_error_inside_the_stream_is_an_error(fake_server: Any) -> None:
    assert "broken" in str(complete(fake_server.url, "break", None).error)


def test_a_stream_that_ends_early_is_an_error(fake_server: Any) -> None:
    assert "without [DONE]" in str(complete(fake_server.url, "end early", None).error)


def test_no_server_is_an_error() -> None:
    assert "ConnectError" in str(complete("http://127.0.0.1:9", "hello", None).error)


@pytest.mark.parametrize(
    ("dialect", "adapter", "expected"),
    [
        ("openai", None, {"model": "base"}),
        ("openai", 2, {"model": "c"}),
        ("llamacpp", None, {"model": "base", "lora": [{"id": 0, "scale": 0.0}]}),
        ("llamacpp", 2, {"model": "base", "lora": [{"id": 2, "scale": 1.0}]}),
        ("mistralrs", None, {"model": "base"}),
        ("mistralrs", 2, {"model": "base", "adapters": ["c"]}),
    ],
)
def test_each_dialect_names_the_adapter_its_own_way(
    dialect: DialectName, adapter: int | None, expected: dict[str, Any]
) -> None:
    body = request_body(dialect, TARGET, Request(0, "p", 1, adapter))
    named = {key: body[key] for key in ("model", "lora", "adapters") if key in body}
    assert named == expected
    assert body.get("cache_prompt", True) is (dialect != "llamacpp")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://localhost:80", "http://[::1]:8000"])
def test_this_machine_may_be_loaded(url: str) -> None:
    assert check_url(url, allow_remote=False) == url.rstrip("/")


def test_another_machine_needs_a_word() -> None:
    with pytest.raises(ValueError, match="--allow-remote"):
        check_url("http://example.org", allow_remote=False)
    assert check_url("http://example.org", allow_remote=True) == "http://example.org"


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        check_url("localhost:8000", allow_remote=False)


def test_each_request_may_be_of_another_user() -> None:
    bodies = [
        request_body("openai", ServedNames("m", users=True), Request(k, "p", 1, None))
        for k in (3, 4)
    ]
    assert [body["user"] for body in bodies] == ["user-3", "user-4"]
    assert "user" not in request_body("openai", TARGET, Request(3, "p", 1, None))


def test_an_api_key_goes_along() -> None:
    client = Client("http://127.0.0.1:1", ServedNames("m", key="secret"))
    assert client.http.headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(client.target)
