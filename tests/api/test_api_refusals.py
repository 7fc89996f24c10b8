"""What is refused: by name, with OpenAI's error body and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server
from text_support import byte_text

from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.openai.requests import CompletionRequest

COMPLETION = {"model": BASE, "prompt": "Hello"}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("refusals")
    with live_server(folder, max_model_len=64, max_queue=8, max_request_bytes=4096) as live:
        yield live


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("name", CompletionRequest.unsupported)
def test_a_completion_names_each_parameter_that_is_not_supported(live: Live, name: str) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, name: ["something"]}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error["message"].startswith(f"{name}: not supported by this server; ")


@pytest.mark.parametrize("name", ChatRequest.unsupported)
def test_a_chat_names_each_parameter_that_is_not_supported(live: Live, name: str) -> None:
    error = error_of(live.post("/v1/chat/completions", {**CHAT, name: ["something"]}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_values_that_ask_for_nothing_are_accepted(live: Live) -> None:
    completion = {"best_of": 1, "echo": False, "suffix": None, "response_format": None}
    completion |= {"store": False, "logit_bias": None, "user": "someone", "stop": None}
    assert live.post("/v1/completions", {**COMPLETION, **completion}).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "functions": None, "modalities": ["text"]}
    chat |= {"response_format": {"type": "text"}, "max_tokens": 2, "service_tier": "auto"}
    assert live.post("/v1/chat/completions", {**CHAT, **chat}).status_code == 200


def test_true_is_not_the_neutral_one(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, "best_of": True}))
    assert error["param"] == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 2**63),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"9999": 1}),
        ("stop_token_ids", [9999]),
        ("stop_token_ids", "1"),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [9999]),
        ("prompt", [-1]),
        ("prompt", "\ud800"),
        ("prompt", 5),
        ("stream", "yes"),
        ("user", 5),
        ("model", 5),
        ("echo", "yes"),
        ("suffix", "end"),
        ("adapters", "sql"),
        ("nonsense", 1),
    ],
)
def test_a_bad_value_is_refused_with_the_fields_name(live: Live, field: str, value: Any) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, field: value}))
    assert error["param"] == field
    assert error["message"].startswith(f"{field}")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "user", "content": "x", "age": 5}]}, "messages[0].age"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"adapters": [{"id": "sql", "weight": "1"}]}, "adapters[0].weight"),
        ({"adapters": [{"weight": 1}]}, "adapters[0].id"),
    ],
)
def test_a_bad_chat_is_refused_with_the_place(live: Live, change: Any, param: str) -> None:
    assert error_of(live.post("/v1/chat/completions", {**CHAT, **change}))["param"] == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "adapters"])
def test_numbers_must_be_finite(live: Live, number: str, field: str) -> None:
    value = number if field == "temperature" else f'[{{"id": "sql", "weight": {number}}}]'
    content = f'{{"model": "{BASE}", "prompt": "Hello", "{field}": {value}}}'
    headers = {"Content-Type": "application/json"}
    response = live.http.post("/v1/completions", content=content, headers=headers)
    assert error_of(response)["param"].startswith(field)


def test_a_missing_field_is_named(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {"model": "tiny/base"}))
    assert (error["param"], error["message"]) == ("prompt", "prompt: is required")


def test_a_prompt_over_the_context_says_the_figures(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, "prompt": "x" * 64}))
    assert error["code"] == "context_length_exceeded"
    assert "64" in error["message"]
    request = {**COMPLETION, "prompt": "x" * 60, "max_tokens": 10}
    error = error_of(live.post("/v1/completions", request))
    assert error["code"] == "context_length_exceeded"
    assert "70" in error["message"]
    assert "lower max_tokens to 4" in error["message"]


def test_the_default_length_gives_way_to_the_context(live: Live) -> None:
    body = live.post("/v1/completions", {**COMPLETION, "prompt": "x" * 60}).json()
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_larger_than_the_queue_is_answered_whole(live: Live, stream: bool) -> None:
    wanted = {**COMPLETION, "prompt": ["a", "b", "c"], "n": 7, "max_tokens": 3, "seed": 1}
    if stream:
        ended = [e for e in live.events("/v1/completions", wanted) if e != "[DONE]"]
        choices = [c["index"] for e in ended for c in e["choices"] if c["finish_reason"]]
    else:
        choices = [c["index"] for c in live.post("/v1/completions", wanted).json()["choices"]]
    assert sorted(choices) == list(range(21))
    assert live.services.client.in_flight == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [({"prompt": ["a"] * 700, "n": 3}, "n"), ({"prompt": ["a"] * 17, "n": 128}, "n")],
)
def test_a_request_has_bounds_of_its_own(live: Live, change: Any, param: str) -> None:
    content = {"model": BASE, "max_tokens": 1, **change}
    assert error_of(live.post("/v1/completions", content))["param"] == param


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("max_token", "max_tokens"),
        ("Temperature", "temperature"),
        ("stream_option", "stream_options"),
    ],
)
def test_an_unknown_field_is_told_with_the_one_spelled_alike(
    live: Live, field: str, near: str
) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, field: 1}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert f"did you mean {near!r}?" in error["message"]


def test_a_refusal_does_not_repeat_what_is_very_long(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, "x" * 3900: 1}))
    assert len(error["param"]) < 2100
    assert len(error["message"]) < 2100


def test_an_unknown_model_is_404(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {**COMPLETION, "model": "nobody"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "nobody" in error["message"]


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"model": ' + "[" * 2000])
def test_a_body_that_is_no_json_object_is_400(live: Live, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = live.http.post("/v1/completions", content=content, headers=headers)
    assert "body" in error_of(response)["message"]


def test_a_form_instead_of_json_says_which_content_type(live: Live) -> None:
    response = live.http.post("/v1/completions", data={"model": BASE})
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_bound_is_413(live: Live, chunked: bool) -> None:
    content = b'{"model": "' + b"x" * 5000 + b'"}'
    headers = {"Content-Type": "application/json"}
    body: Any = iter([content[:100], content[100:]]) if chunked else content
    response = live.http.post("/v1/completions", content=body, headers=headers)
    assert "max_request_bytes" in error_of(response, 413)["message"]


def test_unknown_routes_and_methods_have_the_same_error_body(live: Live) -> None:
    assert "GET /v2/nothing" in error_of(live.http.get("/v2/nothing"), 404)["message"]
    error_of(live.http.get("/v1/completions"), 405)


def test_the_request_id_is_echoed_or_drawn(live: Live) -> None:
    given = live.http.get("/health/live", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    bad = live.http.get("/health/live", headers={"x-request-id": "a b<c>"})
    assert len(bad.headers["x-request-id"]) == 32
    error = live.post("/v1/completions", {})
    assert len(error.headers["x-request-id"]) == 32


def test_an_unforeseen_error_is_500_with_the_request_id_that_the_log_has(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_self: object, _model: str, _adapters: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("quickchange_server.adapter_registry.resolver.Catalog.select", fail)
    response = live.post("/v1/completions", COMPLETION)
    assert "secret" not in error_of(response, 500)["message"]
    assert response.headers["x-request-id"] in caplog.text


def test_a_full_queue_is_429_with_retry_after_and_leaves_nothing_running(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.05)
    with live_server(tmp_path, behaviour, max_queue=5) as live:
        long = {**COMPLETION, "max_tokens": 500, "stream": True, "n": 2}
        with (
            live.http.stream("POST", "/v1/completions", json=long) as one,
            live.http.stream("POST", "/v1/completions", json=long) as other,
        ):
            begun = [one.iter_lines(), other.iter_lines()]  # kept: an iterator that ends, closes
            for lines in begun:
                next(lines)
            refused = live.post("/v1/completions", {**COMPLETION, "n": 3})
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            assert live.services.client.in_flight == 4  # room for one is no room for half of it
            assert live.post("/v1/completions", {**COMPLETION, "max_tokens": 1}).status_code == 200


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    with live_server(tmp_path, text=byte_text(template=None)) as live:
        error = error_of(live.post("/v1/chat/completions", CHAT))
    assert error["param"] == "messages"
    assert "/v1/completions" in error["message"]


def test_what_the_chat_template_refuses_is_400(live: Live) -> None:
    messages = [*CHAT["messages"], {"role": "system", "content": "x"}]
    error = error_of(live.post("/v1/chat/completions", {**CHAT, "messages": messages}))
    assert "system comes first" in error["message"]
