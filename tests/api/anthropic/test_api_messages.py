"""Anthropic's routes over HTTP: what a conversation becomes, the JSON of answers and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_template_files import chat_template
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server, make_adapter
from text_support import END, byte_text
from tool_templates import MARKED

from quickchange_server.api.anthropic.message_requests import MessageRequest
from quickchange_server.api.openapi.message_models import MessageObject
from quickchange_store.store import Store

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call>'
SAID = f"One moment. {CALL}"
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK = [{"role": "user", "content": "Rain in Porto?"}]
CACHE = {"cache_control": {"type": "ephemeral"}}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("messages") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    store = journal.parent / "store"
    Store(store).add("sql", make_adapter(1.0))
    behaviour = Behaviour(says=(*SAID.encode(), END), journal=journal)
    with live_server(store, behaviour, byte_text(MARKED)) as live:
        yield live


def body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "max_tokens": 200, "messages": ASK, **fields}


def answer(live: Live, **fields: Any) -> Any:
    response = live.post("/v1/messages", body(**fields))
    assert response.status_code == 200, response.text
    MessageObject.model_validate(response.json())
    return response.json()


def prompt(live: Live, journal: Path, **fields: Any) -> str:
    """The prompt that the engine got."""
    answer(live, **fields)
    tokens = entries(journal, "Submit")[-1]["prompt"]
    return bytes(token for token in tokens if token < 256).decode()


def events(live: Live, **fields: Any) -> list[tuple[str, Any]]:
    """The stream's events: their names and their data."""
    with live.http.stream("POST", "/v1/messages", json=body(stream=True, **fields)) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = response.read().decode().split("\n\n")
    assert parts.pop() == ""
    told = []
    for part in parts:
        name, data = part.split("\n")
        told.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in told)
    return told


def test_an_answer_is_a_message_of_text(live: Live) -> None:
    told = answer(live)
    assert told["id"].startswith("msg_")
    assert (told["type"], told["role"], told["model"]) == ("message", "assistant", BASE)
    assert told["content"] == [{"type": "text", "text": SAID}]
    assert (told["stop_reason"], told["stop_sequence"]) == ("end_turn", None)
    assert told["usage"]["output_tokens"] == len(SAID) + 1


def test_a_call_becomes_a_block_with_its_input(live: Live) -> None:
    told = answer(live, tools=[WEATHER])
    text, call = told["content"]
    assert text == {"type": "text", "text": "One moment."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Porto"})
    assert told["stop_reason"] == "tool_use"


def test_a_stream_has_anthropics_events_in_their_order(live: Live) -> None:
    told = events(live, tools=[WEATHER])
    names = [name for name, _ in told if name != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert names == ["message_start", "ping", *block, *block, "message_delta", "message_stop"]
    start = told[0][1]["message"]
    assert start["content"] == []
    assert start["stop_reason"] is None
    assert start["usage"]["output_tokens"] == 0
    parts = [
        data["delta"].get("partial_json", "") for name, data in told if name.endswith("k_delta")
    ]
    assert json.loads("".join(parts)) == {"city": "Porto"}
    ended = told[-2][1]
    assert ended["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert ended["usage"]["input_tokens"] == start["usage"]["input_tokens"]


def test_a_stream_tells_the_same_text_as_the_whole_answer(live: Live) -> None:
    told = events(live)
    parts = [data["delta"]["text"] for name, data in told if name == "content_block_delta"]
    assert "".join(parts) == SAID


def test_the_limit_of_tokens_ends_a_message_as_such(live: Live) -> None:
    told = answer(live, max_tokens=3)
    assert told["content"] == [{"type": "text", "text": "One"}]
    assert told["stop_reason"] == "max_tokens"
    assert told["usage"]["output_tokens"] == 3


def test_a_call_that_the_limit_cuts_off_is_no_call_to_run(live: Live) -> None:
    told = answer(live, tools=[WEATHER], max_tokens=SAID.index("Porto"))
    assert told["stop_reason"] == "max_tokens"


def test_a_stop_sequence_is_told_and_not_in_the_text(live: Live) -> None:
    for told in (
        answer(live, stop_sequences=["never", "moment"]),
        events(live, stop_sequences=["never", "moment"])[-2][1]["delta"],
    ):
        assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", "moment")
    assert answer(live, stop_sequences=["moment"])["content"] == [{"type": "text", "text": "One "}]


def test_a_stop_sequence_within_a_call_leaves_no_call_to_run(live: Live) -> None:
    told = answer(live, tools=[WEATHER], stop_sequences=["Porto"])
    assert told["stop_reason"] == "stop_sequence"


def test_text_blocks_are_joined_by_newlines(live: Live, journal: Path) -> None:
    system = [{"type": "text", "text": "Be brief.", **CACHE}, {"type": "text", "text": "Be kind."}]
    content = [{"type": "text", "text": "Rain", **CACHE}, {"type": "text", "text": "in Porto?"}]
    sent = prompt(live, journal, system=system, messages=[{"role": "user", "content": content}])
    assert sent == "system\nBe brief.\nBe kind.\nuser\nRain\nin Porto?\nassistant\n"
    assert prompt(live, journal, system="Be brief.") == (
        "system\nBe brief.\nuser\nRain in Porto?\nassistant\n"
    )


def test_the_line_that_differs_in_every_request_is_not_in_the_prompt(
    live: Live, journal: Path
) -> None:
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=a1b2c;"},
        {"type": "text", "text": "Be brief."},
    ]
    assert prompt(live, journal, system=system).startswith("system\nBe brief.\nuser")


def test_messages_of_one_role_in_a_row_are_one_turn(live: Live, journal: Path) -> None:
    messages = [
        {"role": "user", "content": "Rain"},
        {"role": "user", "content": [{"type": "text", "text": "in Porto?"}]},
        {"role": "assistant", "content": "Some."},
        {"role": "assistant", "content": "A lot."},
        {"role": "user", "content": "How much?"},
    ]
    sent = prompt(live, journal, messages=messages)
    assert sent == "user\nRain\nin Porto?\nassistant\nSome.\nA lot.\nuser\nHow much?\nassistant\n"


def test_an_answer_goes_on_with_the_text_of_a_last_message_of_its_own(
    live: Live, journal: Path
) -> None:
    started = [*ASK, {"role": "assistant", "content": "It rains"}]
    assert prompt(live, journal, messages=started).endswith("assistant\nIt rains")
    counted = live.post("/v1/messages/count_tokens", {"model": BASE, "messages": started})
    assert counted.json() == {
        "input_tokens": answer(live, messages=started)["usage"]["input_tokens"]
    }


def test_calls_and_their_results_are_written_back(live: Live, journal: Path) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Porto"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1"}
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "One moment."},
                call,
                {**call, "id": "toolu_2", "caller": {"type": "direct"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {**result, "content": "12 mm", **CACHE},
                {
                    **result,
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "down"}],
                },
                {**result, "content": [{"type": "tool_reference", "tool_name": "time"}]},
                result,
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    sent = prompt(live, journal, messages=messages, tools=[WEATHER])
    assert f"assistant\nOne moment.{CALL}{CALL}\ntool" in sent, sent
    assert sent.endswith(
        "tool\n12 mm\ntool\nError: down\ntool\ntime\ntool\n\nuser\nWell?\nassistant\n"
    )


def test_tools_stand_in_the_prompt_unless_none_may_be_called(live: Live, journal: Path) -> None:
    sent = prompt(live, journal, tools=[WEATHER, {**WEATHER, "name": "time", "type": "custom"}])
    assert '"name": "weather"' in sent
    assert '"description": "Tells the weather."' in sent
    assert '"name": "time"' in sent
    assert "weather" not in prompt(live, journal, tools=[WEATHER], tool_choice={"type": "none"})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, 2),
        ({"type": "auto", "disable_parallel_tool_use": True}, 1),
        ({"type": "none"}, 0),
    ],
)
def test_the_choice_says_how_many_calls_are_read(
    tmp_path: Path, choice: dict[str, Any], expected: int
) -> None:
    behaviour = Behaviour(says=(*(CALL + CALL).encode(), END))
    with live_server(tmp_path, behaviour, byte_text(MARKED)) as live:
        told = answer(live, tools=[WEATHER], tool_choice=choice)
    assert [block["type"] for block in told["content"]].count("tool_use") == expected


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [({"type": "any"}, ["weather", "time"]), ({"type": "tool", "name": "time"}, ["time"])],
)
def test_a_call_can_be_demanded(
    live: Live, journal: Path, choice: dict[str, Any], allowed: list[str]
) -> None:
    answer(live, tools=[WEATHER, {**WEATHER, "name": "time"}], tool_choice=choice)
    kind, grammar = entries(journal, "Submit")[-1]["constraint"]
    assert kind == "grammar"
    assert [name for name in ("weather", "time") if f'"const": "{name}"' in grammar] == allowed


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_constrains_the_text(live: Live, journal: Path, place: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}
    answer(live, **{place: {"format": form, "effort": "low"} if place == "output_config" else form})
    assert entries(journal, "Submit")[-1]["constraint"][0] == "json_schema"


def test_sampling_is_as_asked() -> None:
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["#"]}
    sampling = MessageRequest.model_validate(body(**wanted)).chat.sampling_params()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.stop, sampling.max_tokens) == (("#",), 200)


def test_an_adapter_a_composition_and_a_drafter_can_be_named(live: Live) -> None:
    assert answer(live, model="sql")["model"] == "sql"
    own = {"adapters": [{"id": "sql", "weight": 0.5}], "turbo": "off"}
    chat = MessageRequest.model_validate(body(**own)).chat
    assert [(one.id, one.weight) for one in chat.adapters] == [("sql", 0.5)]
    assert chat.turbo == "off"


def test_what_clients_send_besides_changes_nothing(live: Live, journal: Path) -> None:
    plain = prompt(live, journal)
    hints: dict[str, Any] = {
        **CACHE,
        "service_tier": "auto",
        "speed": "standard",
        "inference_geo": "us",
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "high"},
        "chat_template_kwargs": {"a_variable_that_no_template_has": 1},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "mcp_servers": [],
        "container": None,
        "betas": ["interleaved-thinking-2025-05-14"],
    }
    assert prompt(live, journal, **hints) == plain


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
        (
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
            {"reasoning_effort": "none", "enable_thinking": False},
        ),
        (
            {"output_config": {"effort": "low"}},
            {"reasoning_effort": "low", "enable_thinking": True},
        ),
        ({"chat_template_kwargs": {"a": 1}}, {"a": 1}),
    ],
)
def test_thinking_is_the_templates_switch(
    fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    sent = body(**fields) | {"max_tokens": 2000}
    assert MessageRequest.model_validate(sent).chat.how.variables == variables


THOUGHT = "<think>\nHm, 2.\n</think>\n\nTwo."


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Path]]:
    """A server whose model thinks before it answers, as its chat template has it."""
    folder = tmp_path_factory.mktemp("thinking")
    behaviour = Behaviour(says=(*THOUGHT.encode(), END), journal=folder / "journal")
    text = byte_text(chat_template("thinks_in_field"))
    with live_server(folder / "store", behaviour, text) as live:
        yield live, folder / "journal"


def collected(live: Live, **fields: Any) -> list[Any]:
    """The blocks that a stream's events add up to."""
    sent = body(stream=True, **fields)
    with live.http.stream("POST", "/v1/messages", json=sent) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    blocks: list[Any] = []
    for event in (json.loads(line.removeprefix("data: ")) for line in lines):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            for name, text in event["delta"].items():
                if name != "type":
                    blocks[-1][name] = blocks[-1].get(name, "") + text
    return blocks


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_thoughts_are_a_block_before_the_text(thinking: tuple[Live, Path], streamed: bool) -> None:
    live, _ = thinking
    content = collected(live) if streamed else answer(live)["content"]
    assert [block["type"] for block in content] == ["thinking", "text"]
    assert (content[0]["thinking"], content[1]["text"]) == ("Hm, 2.", "Two.")
    assert len(content[0]["signature"]) == 64


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_thoughts_can_be_left_out_of_their_block(
    thinking: tuple[Live, Path], streamed: bool
) -> None:
    live, _ = thinking
    fields = {"thinking": {"type": "adaptive", "display": "omitted"}}
    content = collected(live, **fields) if streamed else answer(live, **fields)["content"]
    assert [block["type"] for block in content] == ["thinking", "text"]
    assert (content[0]["thinking"], content[1]["text"]) == ("", "Two.")


def test_thoughts_that_are_sent_back_are_the_templates_own(thinking: tuple[Live, Path]) -> None:
    live, journal = thinking
    blocks = answer(live)["content"]
    turns = [*ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": "Sure?"}]
    sent = prompt(live, journal, messages=turns)
    assert "Two." in sent
    chat = [*ASK, {"role": "assistant", "content": "Two.", "reasoning": "Hm, 2."}, turns[-1]]
    tokens = live.post("/tokenize", {"messages": chat}).json()["tokens"]
    assert sent == bytes(token for token in tokens if token < 256).decode()


COUNTED: list[dict[str, Any]] = [
    {},
    {"system": "Be brief."},
    {"tools": [WEATHER]},
    {"tools": [WEATHER], "tool_choice": {"type": "none"}},
    {"tools": [WEATHER], "tool_choice": {"type": "any"}},
    {"thinking": {"type": "disabled"}},
]


@pytest.mark.parametrize("fields", COUNTED)
def test_the_count_is_that_of_the_answers_usage(live: Live, fields: dict[str, Any]) -> None:
    counted = live.post("/v1/messages/count_tokens", {"model": BASE, "messages": ASK, **fields})
    assert counted.status_code == 200, counted.text
    assert counted.json() == {"input_tokens": answer(live, **fields)["usage"]["input_tokens"]}


def test_a_conversation_that_is_too_long_is_counted(live: Live) -> None:
    messages = [{"role": "user", "content": "x" * 5000}]
    counted = live.post("/v1/messages/count_tokens", {"model": BASE, "messages": messages})
    assert counted.json()["input_tokens"] > 5000


def test_an_experiment_answers_and_says_its_variant(live: Live) -> None:
    variants = [{"name": "now", "model": BASE}, {"name": "tuned", "model": "sql"}]
    made = {"name": "trial", "variants": variants, "metrics": [{"name": "liked"}]}
    assert live.post("/v1/experiments", made).status_code == 201
    sent = body(model="trial", metadata={"user_id": "someone"})
    told = {live.post("/v1/messages", sent).json()["quickchange"]["variant"] for _ in range(4)}
    assert len(told) == 1  # it sticks to the user
    response = live.post("/v1/messages", sent)
    assert response.headers["x-quickchange-variant"] in told
