"""/v1/responses: its answers and streams, as OpenAI's own client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from openai.types.responses import Response
from text_support import END, byte_text
from tool_templates import MARKED

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": None,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call>'
ANSWER = f"One moment. {CALL}"


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("responses") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    """A server whose every answer is `ANSWER`, and that stores nothing."""
    behaviour = Behaviour(says=(*ANSWER.encode(), END), journal=journal)
    with live_server(journal.parent / "store", behaviour, byte_text(MARKED)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events_of(live: Live, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each one's name is its type, and the numbers have no gap."""
    body = {"model": BASE, "input": "Rain?", **fields, "stream": True}
    with live.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    told = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [e["type"] for e in told]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def sent(live: Live, journal: Path, **fields: Any) -> str:
    """The prompt that a body becomes."""
    response = live.post("/v1/responses", {"model": BASE, **fields})
    assert response.status_code == 200, response.text
    prompt: Any = entries(journal, "Submit")[-1]["prompt"]
    return bytes(token for token in prompt if token < 256).decode()


# --- answers ------------------------------------------------------------------------------------


def test_openais_client_reads_text_and_calls(client: openai.OpenAI) -> None:
    response = client.responses.create(model=BASE, input="Rain?", tools=[WEATHER])  # type: ignore[list-item]
    assert response.status == "completed"
    assert response.output_text == "One moment. "
    message, call = response.output
    assert (message.type, call.type) == ("message", "function_call")
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Porto"}
    assert call.call_id != call.id
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + len(ANSWER) + 1


def test_an_answer_has_every_field_that_openais_client_needs(live: Live) -> None:
    told = live.post("/v1/responses", {"model": BASE, "input": "Rain?", "tools": [WEATHER]}).json()
    needed = {name for name, field in Response.model_fields.items() if field.is_required()}
    assert needed <= told.keys()
    Response.model_validate(told, strict=False)  # which the client itself does not do


def test_what_the_body_says_is_told_back(live: Live) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "tool_choice": {"type": "function", "name": "weather"},
        "tools": [WEATHER],
        "top_p": 0.5,
        "truncation": "auto",
        "user": "someone",
    }
    told = live.post("/v1/responses", {"model": BASE, "input": "Rain?", **asked}).json()
    assert {name: told[name] for name in asked} == asked
    assert told["store"] is False  # nothing is stored here


def test_an_answer_that_is_cut_off_is_incomplete(live: Live) -> None:
    told = live.post("/v1/responses", {"model": BASE, "input": "?", "max_output_tokens": 3}).json()
    assert told["status"] == "incomplete"
    assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    assert told["completed_at"] is None
    (message,) = told["output"]
    assert message["status"] == "incomplete"
    assert message["content"][0]["text"] == ANSWER[:3]


def test_log_probabilities_are_told_where_they_are_included(live: Live) -> None:
    include = ["message.output_text.logprobs"]
    body = {"model": BASE, "input": "Rain?", "max_output_tokens": 3}
    told = live.post("/v1/responses", {**body, "include": include, "top_logprobs": 1}).json()
    logprobs = told["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == list(ANSWER[:3])
    assert all(entry["logprob"] == -1 and len(entry["top_logprobs"]) == 1 for entry in logprobs)
    assert live.post("/v1/responses", body).json()["output"][0]["content"][0]["logprobs"] == []
    deltas = [
        event
        for event in events_of(live, include=include, max_output_tokens=3)
        if event["type"] == "response.output_text.delta"
    ]
    assert [entry["token"] for delta in deltas for entry in delta["logprobs"]] == list(ANSWER[:3])


# --- streams ------------------------------------------------------------------------------------


def test_a_streams_events_come_in_openais_order(live: Live) -> None:
    kinds = [event["type"] for event in events_of(live, tools=[WEATHER])]
    in_order = list(dict.fromkeys(kind.removeprefix("response.") for kind in kinds))
    assert in_order == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *("function_call_arguments.delta", "function_call_arguments.done", "completed"),
    ]
    assert (
        kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    )


def test_a_stream_ends_in_what_its_events_add_up_to(live: Live) -> None:
    told = events_of(live, tools=[WEATHER])
    output = told[-1]["response"]["output"]
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == output
    for index, item in enumerate(output):
        deltas = [e["delta"] for e in told if "delta" in e and e["output_index"] == index]
        whole = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
        assert "".join(deltas) == whole
    added = [event["item"] for event in told if event["type"] == "response.output_item.added"]
    assert [item["status"] for item in added] == ["in_progress"] * 2
    assert added[0]["content"] == []
    assert added[1]["arguments"] == ""


def test_a_stream_says_what_the_whole_answer_says(live: Live) -> None:
    body = {"model": BASE, "input": "Rain?", "tools": [WEATHER]}
    whole = live.post("/v1/responses", body).json()
    streamed = events_of(live, tools=[WEATHER])[-1]["response"]

    def without_ids(response: dict[str, Any]) -> dict[str, Any]:
        passing = ("id", "created_at", "completed_at", "output")
        kept = {name: value for name, value in response.items() if name not in passing}
        items = [
            {name: value for name, value in item.items() if name not in ("id", "call_id")}
            for item in response["output"]
        ]
        return {**kept, "output": items}

    assert without_ids(streamed) == without_ids(whole)


def test_openais_stream_helper_follows(client: openai.OpenAI) -> None:
    with client.responses.stream(model=BASE, input="Rain?", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == "One moment. "


def test_a_stream_that_is_cut_off_ends_incomplete(live: Live) -> None:
    told = events_of(live, max_output_tokens=3)
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_blanks_before_a_call_are_no_message(journal: Path) -> None:
    behaviour = Behaviour(says=(*f"\n\n{CALL}".encode(), END))
    with live_server(journal.parent / "blanks", behaviour, byte_text(MARKED)) as live:
        told = live.post("/v1/responses", {"model": BASE, "input": "?", "tools": [WEATHER]}).json()
        assert [item["type"] for item in told["output"]] == ["function_call"]


def test_an_answer_of_nothing_has_an_empty_message(journal: Path) -> None:
    with live_server(journal.parent / "empty", Behaviour(says=(END,)), byte_text()) as live:
        told = live.post("/v1/responses", {"model": BASE, "input": "?"}).json()
        (message,) = told["output"]
        assert message["content"][0]["text"] == ""
        assert [event["type"] for event in events_of(live)][-1] == "response.completed"


# --- what the model sees ------------------------------------------------------------------------


def test_instructions_and_leading_system_messages_are_one(live: Live, journal: Path) -> None:
    items = [{"role": "developer", "content": "In German."}, {"role": "user", "content": "Rain?"}]
    prompt = sent(live, journal, instructions="Be brief.", input=items)
    assert prompt == "system\nBe brief.\n\nIn German.\nuser\nRain?\nassistant\n"


def test_parts_are_joined(live: Live, journal: Path) -> None:
    parts = [{"type": "input_text", "text": "Rain"}, {"type": "input_text", "text": "now?"}]
    prompt = sent(live, journal, input=[{"type": "message", "role": "user", "content": parts}])
    assert prompt == "user\nRain\nnow?\nassistant\n"


def test_an_output_is_taken_as_input_again(live: Live, journal: Path) -> None:
    body = {"model": BASE, "input": "Rain?", "tools": [WEATHER]}
    output = live.post("/v1/responses", body).json()["output"]
    answer = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "12 mm"}
    items = [{"role": "user", "content": "Rain?"}, *output, answer]
    prompt = sent(live, journal, input=items)
    assert prompt == f"user\nRain?\nassistant\n{ANSWER}\ntool\n12 mm\nassistant\n"


def test_calls_in_a_row_are_one_message(live: Live, journal: Path) -> None:
    call = {"type": "function_call", "name": "weather", "arguments": '{"city": "Porto"}'}
    out = {"type": "function_call_output", "output": [{"type": "input_text", "text": "12 mm"}]}
    items = [
        {"role": "user", "content": "Rain?"},
        *({**call, "call_id": id} for id in ("a", "b")),
        *({**out, "call_id": id} for id in ("a", "b")),
    ]
    prompt = sent(live, journal, input=items)
    assert prompt.count("assistant\n") == 2  # the calls', and the answer's
    assert prompt.count(CALL) == 2
    assert prompt.count("tool\n12 mm") == 2


def test_only_allowed_tools_are_offered(live: Live, journal: Path) -> None:
    clock = {"type": "function", "name": "clock"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [clock]}
    prompt = sent(live, journal, input="Rain?", tools=[WEATHER, clock], tool_choice=allowed)
    assert '"clock"' in prompt
    assert '"weather"' not in prompt


def test_a_schema_constrains_the_text(live: Live, journal: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = {"format": {"type": "json_schema", "name": "it", "schema": schema}, "verbosity": "low"}
    response = live.post("/v1/responses", {"model": BASE, "input": "?", "text": text})
    assert response.status_code == 200, response.text
    constraint: Any = entries(journal, "Submit")[-1]["constraint"]
    assert json.loads(constraint["source"] if isinstance(constraint, dict) else constraint[1]) == (
        schema
    )
    told = response.json()["text"]
    assert told["format"]["schema"] == schema
    assert told["verbosity"] == "low"


@pytest.mark.parametrize("length", [40, 200])
def test_truncation_leaves_out_the_oldest_turns(tmp_path: Path, length: int) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(says=(*b"Yes", END), journal=journal)
    with live_server(tmp_path / "s", behaviour, byte_text(), max_model_len=256) as live:
        said = [{"role": "user", "content": f"{n} {'x' * length}"} for n in range(6)]
        body = {"model": BASE, "instructions": "Short.", "input": said}
        refused = live.post("/v1/responses", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["param"] == "input"
        prompt = sent(
            live, journal, **{k: v for k, v in body.items() if k != "model"}, truncation="auto"
        )
    assert prompt.startswith("system\nShort.\n")
    assert f"user\n5 {'x' * length}" in prompt
    assert "user\n0 " not in prompt
