"""What Anthropic's routes refuse: by which name, with which status, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server
from keys_support import keyed_server
from text_support import byte_text
from tool_templates import MARKED

from quickchange_server.api.openapi.message_models import MessageErrorBody

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
ASK = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {}}
TOOL = {"name": "order", "input_schema": SCHEMA}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("store"), text=byte_text(MARKED)) as live:
        yield live


def refused(live: Live, path: str, sent: Any, status: int = 400) -> Any:
    response = live.post(path, sent)
    assert response.status_code == status, response.text
    told = response.json()
    MessageErrorBody.model_validate(told)
    assert told["request_id"] == response.headers["request-id"]
    assert told["request_id"] == response.headers["x-request-id"]
    return told["error"]


def said(*blocks: Any, role: str = "user") -> list[Any]:
    return [*ASK, {"role": role, "content": list(blocks)}]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": said({"type": "image", "source": {}})}, "messages[1].content[0].type"),
        ({"messages": said({"type": "document"})}, "messages[1].content[0].type"),
        ({"messages": said({"text": "x"})}, "messages[1].content[0]"),
        ({"messages": said({"type": "text"})}, "messages[1].content[0].text"),
        ({"messages": said({"type": "text", "text": 1})}, "messages[1].content[0].text"),
        ({"messages": said({"type": "text", "text": "\ud800"})}, "messages[1].content[0].text"),
        ({"messages": said({"type": "text", "text": "", "x": 1})}, "messages[1].content[0].x"),
        ({"messages": said({"type": "tool_result"})}, "messages[1].content[0].tool_use_id"),
        (
            {
                "messages": said(
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}
                )
            },
            "messages[1].content[0].content[0].type",
        ),
        (
            {"messages": said({"type": "tool_use", "id": "a", "name": "b", "input": {}})},
            "messages[1].content[0]",
        ),
        (
            {"messages": said({"type": "tool_use", "id": "a", "name": "b"}, role="assistant")},
            "messages[1].content[0].input",
        ),
        (
            {
                "messages": said(
                    {"type": "tool_use", "id": "a", "name": "b", "input": {"x": "\ud800"}},
                    role="assistant",
                )
            },
            "messages[1].content[0].input",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "order"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "name": "two words"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "order"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 2048}}, "thinking.budget_tokens"),
        ({"thinking": {"budget_tokens": 2048}}, "thinking.type"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_field_is_named_by_the_clients_own_path(
    live: Live, path: str, fields: dict[str, Any], name: str
) -> None:
    error = refused(live, path, {"model": BASE, "max_tokens": 5, "messages": ASK, **fields})
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{name}: "), error


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"metadata": {"user_id": 1}}, "metadata.user_id"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, "thinking.budget_tokens"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema.not",
        ),
        (
            {"tools": [{**TOOL, "strict": True, "input_schema": {**SCHEMA, "not": {}}}]},
            "tools[0].input_schema.not",
        ),
        (
            {
                "output_format": {"type": "json_schema", "schema": SCHEMA},
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            },
            "output_format",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "any"},
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            },
            "tool_choice",
        ),
    ],
)
def test_a_wrong_field_of_the_answer_is_named_too(
    live: Live, fields: dict[str, Any], name: str
) -> None:
    sent = {"model": BASE, "max_tokens": 2000, "messages": ASK, **fields}
    error = refused(live, "/v1/messages", sent)
    assert error["message"].startswith(f"{name}: "), error
    assert "response_format" not in error["message"]


def test_a_prompt_that_is_too_long_is_refused(live: Live) -> None:
    messages = [{"role": "user", "content": "x" * 3000}]
    sent = {"model": BASE, "max_tokens": 5, "messages": messages}
    assert "maximum context length" in refused(live, "/v1/messages", sent)["message"]


def test_tools_are_refused_where_the_template_takes_none(tmp_path: Path) -> None:
    with live_server(tmp_path) as live:
        for path in PATHS:
            sent = {"model": BASE, "max_tokens": 5, "messages": ASK, "tools": [TOOL]}
            assert refused(live, path, sent)["message"].startswith("tools: ")


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_is_not_there_is_not_found(live: Live, path: str) -> None:
    sent = {"model": "nobody", "max_tokens": 5, "messages": ASK}
    error = refused(live, path, sent, 404)
    assert error["type"] == "not_found_error"
    assert "'nobody'" in error["message"]


def test_a_thread_is_refused_in_the_way_that_has_the_library_go_on_without(live: Live) -> None:
    thread = {"type": "create"}
    sent = {"model": BASE, "max_tokens": 5, "messages": ASK, "thread": thread}
    details = refused(live, "/v1/messages", sent)["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_a_body_that_is_no_json_or_too_large_is_refused_in_the_same_form(tmp_path: Path) -> None:
    with live_server(tmp_path, max_request_bytes=1024) as live:
        for content, status, kind in (
            (b"{", 400, "invalid_request_error"),
            (b"[]", 400, "invalid_request_error"),
            (b'"' + b"x" * 2000 + b'"', 413, "request_too_large"),
        ):
            headers = {"Content-Type": "application/json"}
            response = live.http.post("/v1/messages", content=content, headers=headers)
            assert response.status_code == status
            MessageErrorBody.model_validate(response.json())
            assert response.json()["error"]["type"] == kind


def test_a_method_or_a_route_that_is_not_there_is_refused_in_the_same_form(live: Live) -> None:
    response = live.http.get("/v1/messages")
    assert response.status_code == 405
    assert response.json()["type"] == "error"
    response = live.http.post("/v1/messages/batches", json={}, headers=VERSION)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_without_a_key_the_client_is_not_authenticated(tmp_path: Path) -> None:
    with keyed_server(tmp_path) as live:
        sent = {"model": BASE, "max_tokens": 2, "messages": ASK}
        key = live.http.headers.pop("authorization").removeprefix("Bearer ")
        assert refused(live, "/v1/messages", sent, 401)["type"] == "authentication_error"
        response = live.http.post("/v1/messages", json=sent, headers={"x-api-key": key})
        assert response.status_code == 200, response.text


def test_a_full_queue_is_a_rate_limit_with_a_time_to_come_again(tmp_path: Path) -> None:
    with live_server(tmp_path, Behaviour(step_seconds=0.05), max_queue=1) as live:
        sent = {"model": BASE, "max_tokens": 500, "messages": ASK, "stream": True}
        with live.http.stream("POST", "/v1/messages", json=sent) as first:
            lines = first.iter_lines()  # kept: its end would close the stream
            next(lines)
            response = live.post("/v1/messages", sent)
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1


def test_an_error_within_a_stream_is_its_last_event(tmp_path: Path) -> None:
    behaviour = Behaviour(poison=ord("u"), poison_at=3)
    with live_server(tmp_path, behaviour, byte_text("{{ messages[0].content }}")) as live:
        sent = {"model": BASE, "max_tokens": 50, "messages": [{"role": "user", "content": "ugh"}]}
        with live.http.stream("POST", "/v1/messages", json={**sent, "stream": True}) as response:
            lines = [line for line in response.read().decode().split("\n") if line]
    assert "event: message_start" in lines
    assert lines[-2] == "event: error"
    assert '"type":"error"' in lines[-1]
    assert "event: message_stop" not in lines


def test_models_are_told_in_anthropics_form_to_its_clients(live: Live) -> None:
    listed = live.http.get("/v1/models", headers=VERSION).json()
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, BASE, BASE)
    (card,) = listed["data"]
    assert (card["type"], card["id"], card["display_name"]) == ("model", BASE, BASE)
    assert card["created_at"].endswith("+00:00")
    assert live.http.get(f"/v1/models/{BASE}", headers=VERSION).json() == card
    missing = live.http.get("/v1/models/nobody", headers=VERSION)
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"
    assert live.http.get("/v1/models").json()["object"] == "list"
