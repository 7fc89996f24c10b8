"""What /v1/responses refuses: each by the name that the client gave it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server
from text_support import END, byte_text
from tool_templates import MARKED

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
HOSTED = (
    "web_search",
    "web_search_preview",
    "file_search",
    "code_interpreter",
    "computer_use_preview",
    "image_generation",
    "local_shell",
    "mcp",
    "custom",
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    behaviour = Behaviour(says=(*b"Yes", END))
    with live_server(tmp_path_factory.mktemp("r"), behaviour, byte_text(MARKED)) as live:
        yield live


def refused(live: Live, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = live.post("/v1/responses", {"model": BASE, "input": "Hi", **fields})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] is None or error["message"].startswith(error["param"]), error
    return error


@pytest.mark.parametrize("kind", HOSTED)
def test_a_hosted_tool_is_refused_by_its_name(live: Live, kind: str) -> None:
    error = refused(live, tools=[TOOL, {"type": kind, "server_label": "x", "container": {}}])
    assert error["param"] == "tools[1].type"
    assert repr(kind) in error["message"]
    assert "declare a function" in error["message"]
    assert refused(live, tools=[TOOL], tool_choice={"type": kind})["param"] == "tool_choice.type"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "web_search_call", "id": "w"}]},
         "input[1].type"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"truncation": "middle"}, "truncation"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True},
         "stream_options.include_obfuscation"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].function"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "function", "name": "none"}]}}, "tool_choice.tools[0].name"),
        ({"inptu": "x"}, "inptu"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_told_by_its_place(live: Live, fields: dict[str, Any], param: str) -> None:
    assert refused(live, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
         "text.format.schema.not"),
        ({"tools": [{**TOOL, "strict": True, "parameters": {"not": {}}}]},
         "tools[0].parameters.not"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
        ({"max_output_tokens": 10**9}, "input"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"min_tokens": 5, "max_output_tokens": 2}, "min_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_chat_refuses_is_told_by_this_bodys_own_names(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    response = live.post("/v1/responses", {"model": BASE, "input": "Hi", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    for chats_own in ("response_format", "messages", ".function.", "max_completion_tokens"):
        assert chats_own not in error["message"]


def test_more_tokens_than_fit_are_told_with_the_limit_that_would_do(live: Live) -> None:
    error = refused_length(live)
    assert "lower max_output_tokens to" in error["message"]


def refused_length(live: Live) -> dict[str, Any]:
    response = live.post(
        "/v1/responses", {"model": BASE, "input": "Hi", "max_output_tokens": 10**6}
    )
    assert response.status_code == 400
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    return error


def test_an_unknown_model_is_404_before_a_stream_begins(live: Live) -> None:
    assert refused(live, 404, model="nobody", stream=True)["param"] == "model"


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"background": False},
        {"service_tier": "auto"},
        {"reasoning": {"effort": "low", "summary": "auto", "generate_summary": "auto"}},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"max_tool_calls": 1},
        {"text": {"verbosity": "high"}},
        {"tools": [], "conversation": None, "prompt": None},
        {"stream_options": {}},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(live: Live, fields: dict[str, Any]) -> None:
    assert live.post("/v1/responses", {"model": BASE, "input": "Hi", **fields}).status_code == 200


def test_without_stored_responses_what_needs_them_names_the_setting(live: Live) -> None:
    error = refused(live, previous_response_id="resp_1")
    assert error["param"] == "previous_response_id"
    assert "store_responses" in error["message"]
    error = refused(live, input=[{"type": "item_reference", "id": "msg_1"}])
    assert error["param"] == "input[0]"
    assert "store_responses" in error["message"]
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/input_items"),
        ("POST", "/cancel"),
    ):
        response = live.http.request(method, f"/v1/responses/resp_1{path}")
        assert response.status_code == 403
        assert "store_responses" in response.json()["error"]["message"]
