"""Tool calls over HTTP: what is asked, what is refused, and the JSON of answers and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from text_support import END, START, byte_text
from tool_templates import BARE, BROKEN, LISTED, MARKED, SPECIAL, TEXTUAL

from quickchange_server.api.openai.chat.tool_grammars import call_grammar, free_grammar
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import TokenGrammars

ASK = [{"role": "user", "content": "Rain in Porto?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call>'
ANSWER = f"One moment. {CALL}"


def says(text: str) -> Behaviour:
    return Behaviour(says=(*text.encode(), END))


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    behaviour = Behaviour(says=says(ANSWER).says, journal=journal)
    with live_server(journal.parent / "store", behaviour, byte_text(MARKED)) as live:
        yield live


def chat(live: Live, **fields: Any) -> Any:
    body = {"model": BASE, "messages": ASK, "tools": [WEATHER, TIME], **fields}
    return live.post("/v1/chat/completions", body)


def prompt_of(submitted: dict[str, Any]) -> str:
    return bytes(token for token in submitted["prompt"] if token < 256).decode()


def choice(live: Live, **fields: Any) -> Any:
    response = chat(live, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_a_call_is_taken_out_of_the_text(live: Live) -> None:
    answered = choice(live)
    assert answered["finish_reason"] == "tool_calls"
    assert answered["message"]["content"] == "One moment."
    (call,) = answered["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Porto"}


def test_a_call_of_no_offered_tool_is_text(live: Live) -> None:
    answered = choice(live, tools=[TIME])
    assert answered["message"]["content"] == ANSWER
    assert "tool_calls" not in answered["message"]
    assert answered["finish_reason"] == "stop"


def test_without_tools_nothing_is_read_as_a_call(live: Live) -> None:
    for fields in ({"tools": []}, {"tool_choice": "none"}):
        assert choice(live, **fields)["message"]["content"] == ANSWER


def test_tools_stand_in_the_prompt_as_the_template_writes_them(live: Live, journal: Path) -> None:
    choice(live)
    prompt = prompt_of(entries(journal, "Submit")[-1])
    assert prompt.startswith("system\nTools: ")
    assert '"name": "weather"' in prompt


def test_a_conversation_with_calls_is_written_back(live: Live, journal: Path) -> None:
    function = {"name": "weather", "arguments": '{"city": "Porto"}'}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a1", "function": function}]},
        {"role": "tool", "tool_call_id": "a1", "content": "12 mm"},
    ]
    choice(live, messages=messages)
    prompt = prompt_of(entries(journal, "Submit")[-1])
    assert CALL in prompt
    assert "tool\n12 mm" in prompt


def test_a_stream_tells_text_and_the_parts_of_a_call_as_they_come(live: Live) -> None:
    events = live.events(
        "/v1/chat/completions", {"model": BASE, "messages": ASK, "tools": [WEATHER]}
    )
    deltas = [event["choices"][0] for event in events[:-1]]
    text = "".join(delta["delta"].get("content") or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta["delta"].get("tool_calls", [])]
    assert text.strip() == "One moment."
    first, *others = calls
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert len(first["id"]) == 9
    assert len(others) > 5
    assert all(call.keys() == {"index", "function"} for call in others)
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Porto"}'
    ends = [(delta["delta"], delta["finish_reason"]) for delta in deltas if delta["finish_reason"]]
    assert ends == [({}, "tool_calls")]  # behind the call: OpenAI's client tells it only then


def test_openais_library_reads_the_calls(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=BASE, messages=ASK, tools=[WEATHER])  # type: ignore[arg-type, list-item]
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"


def test_openais_library_joins_the_pieces_of_calls(tmp_path: Path) -> None:
    text = f"One moment. {CALL}\n{CALL.replace('Porto', 'Faro')}"
    with (
        live_server(tmp_path, says(text), byte_text(MARKED)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model=BASE, messages=ASK, tools=[WEATHER]) as stream,  # type: ignore[arg-type, list-item]
    ):
        grown = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        done = stream.get_final_completion().choices[0]
    assert done.finish_reason == "tool_calls"
    assert (done.message.content or "").strip() == "One moment."
    told = [call.function.arguments for call in done.message.tool_calls or []]
    assert told == ['{"city": "Porto"}', '{"city": "Faro"}']
    assert len(grown) > 10


def test_no_special_token_but_those_of_calls_is_told(tmp_path: Path) -> None:
    told = (START, *b"Hm.", START, *b'call\n{"name": "time", "arguments": {}}</call>', END)
    with live_server(tmp_path, Behaviour(says=told), byte_text(SPECIAL)) as live:
        message = choice(live)["message"]
    assert message["content"] == "<|im_start|>Hm."  # it may begin a call, and is none
    told = (START, *b"Hm. ", *CALL.encode(), END)
    with live_server(tmp_path / "other", Behaviour(says=told), byte_text(MARKED)) as live:
        message = choice(live)["message"]
    assert message["content"] == "Hm."
    assert len(message["tool_calls"]) == 1


def test_one_call_at_most_where_parallel_calls_are_off(tmp_path: Path) -> None:
    with live_server(tmp_path, says(CALL + CALL), byte_text(MARKED)) as live:
        assert len(choice(live)["message"]["tool_calls"]) == 2
        assert len(choice(live, parallel_tool_calls=False)["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("tool_choice", "names"),
    [
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "weather"}}, ["weather"]),
    ],
)
def test_a_demanded_call_is_a_constraint(
    live: Live, journal: Path, tool_choice: Any, names: list[str]
) -> None:
    choice(live, tool_choice=tool_choice)
    kind, source = entries(journal, "Submit")[-1]["constraint"]
    assert kind == "grammar"
    assert [name for name in ("weather", "time") if f'"const": "{name}"' in source] == names


def accepts(
    template: str,
    tools: list[Any],
    written: str,
    *,
    free: bool = False,
    parallel: bool = True,
    answer: dict[str, Any] | None = None,
) -> bool:
    """True if the grammar of a demanded call, or of free text with calls, accepts a text."""
    text = byte_text(template)
    assert text.tool_form is not None
    offered = [Tool.model_validate(tool) for tool in tools]
    if free:
        source = free_grammar(text, text.tool_form, offered, parallel=parallel, answer=answer)
    else:
        source = call_grammar(text, text.tool_form, offered)
    matcher = TokenGrammars.of(text).compile(Constraint("grammar", source))
    tokens = [*written.encode(), END]
    return matcher.allowed(tokens) == len(tokens)


def test_the_grammar_is_of_one_call_that_fits_its_schema() -> None:
    assert accepts(MARKED, [WEATHER, TIME], CALL)
    assert accepts(MARKED, [TIME], CALL.replace("weather", "time"))
    assert not accepts(MARKED, [TIME], CALL)
    assert not accepts(MARKED, [WEATHER], CALL + CALL)
    assert not accepts(MARKED, [WEATHER], CALL.replace('"Porto"', "7"))
    assert not accepts(MARKED, [WEATHER], CALL.replace("city", "town"))


def test_a_listed_call_is_a_list_of_one() -> None:
    call = '{"function": {"name": "weather", "arguments": {"city": "Porto"}}}'
    assert accepts(LISTED, [WEATHER], f"[CALLS][{call}]")
    assert not accepts(LISTED, [WEATHER], f"[CALLS]{call}")
    assert not accepts(LISTED, [WEATHER], f"[CALLS][{call}, {call}]")


def referring(parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


UNIT = {"enum": ["c", "f"]}
NESTED = {
    "type": "object",
    "properties": {"u": {"$ref": "#/$defs/U"}},
    "required": ["u"],
    "additionalProperties": False,
    "$defs": {"U": UNIT},
}
ESCAPED = {**NESTED, "properties": {"u": {"$ref": "#/definitions/a~1b%20c"}}}
ESCAPED = {**ESCAPED, "definitions": {"a/b c": UNIT}, "$defs": {}}
RECURSIVE = {
    "type": "object",
    "properties": {"u": {"enum": ["c"]}, "next": {"$ref": "#"}},
    "required": ["u"],
    "additionalProperties": False,
}
NAMED_SO = {
    "type": "object",
    "properties": {"$ref": {"type": "string"}, "u": {"const": {"$ref": "#/nowhere"}}},
    "required": ["$ref"],
    "additionalProperties": False,
    "default": {"$ref": "#/nowhere"},
}


@pytest.mark.parametrize("template", [MARKED, BARE, LISTED])
@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (NESTED, {"u": "f"}, {"u": "x"}),
        (ESCAPED, {"u": "c"}, {"u": "x"}),
        (RECURSIVE, {"u": "c", "next": {"u": "c"}}, {"u": "c", "next": {"u": "x"}}),
        (NAMED_SO, {"$ref": "#", "u": {"$ref": "#/nowhere"}}, {"$ref": 5}),
        ({"$ref": "#/$defs/P", "$defs": {"P": NESTED | {"properties": {"u": UNIT}}}},
         {"u": "c"}, {"u": 1}),
    ],
    ids=["defs", "escaped", "recursive", "named $ref", "root"],
)  # fmt: skip
def test_references_of_parameters_hold_in_a_demanded_call(
    template: str, parameters: dict[str, Any], right: Any, wrong: Any
) -> None:
    other = referring(NESTED)
    other["function"]["name"] = "g"
    tools = [other, referring(parameters)]
    for arguments, lawful in ((right, True), (wrong, False)):
        if template == MARKED:
            call = json.dumps({"name": "f", "arguments": arguments})
            written = f"<tool_call>\n{call}\n</tool_call>"
        elif template == BARE:
            written = json.dumps({"name": "f", "parameters": arguments})
        else:
            call = json.dumps({"function": {"name": "f", "arguments": arguments}})
            written = f"[CALLS][{call}]"
        assert accepts(template, tools, written) is lawful
        strict = [other, referring(parameters, strict=True)]
        assert accepts(template, strict, written, free=True) is lawful


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**tool["function"], "strict": True}}


def test_a_strict_function_is_kept_to_its_schema_from_where_a_call_opens() -> None:
    tools = [strict(WEATHER), TIME]
    wrong = CALL.replace('"Porto"', "7")
    for text in ("", "It rains.", "It is <tool_ and", CALL, f"So: {CALL}\n{CALL} done",
                 '<tool_call>{"name": "time", "arguments": {"any": 1}}</tool_call>'):  # fmt: skip
        assert accepts(MARKED, tools, text, free=True)
    for text in (wrong, f"So: {wrong}", f"{CALL} {wrong}", "<tool_call>", "<tool_call>\nno"):
        assert not accepts(MARKED, tools, text, free=True)
    assert not accepts(MARKED, tools, CALL + CALL, free=True, parallel=False)


def test_a_strict_function_without_marks_is_what_a_text_of_json_calls() -> None:
    call = '{"name": "weather", "parameters": {"city": "Porto"}}'
    for text in ("It rains.", " \n It {rains}", call, ""):
        assert accepts(BARE, [strict(WEATHER)], text, free=True)
    assert not accepts(BARE, [strict(WEATHER)], call.replace("city", "town"), free=True)


def test_a_strict_list_of_calls_may_have_several() -> None:
    call = '{"function": {"name": "weather", "arguments": {"city": "Porto"}}}'
    assert accepts(LISTED, [strict(WEATHER)], f"Ok [CALLS][{call}, {call}]", free=True)
    assert not accepts(
        LISTED, [strict(WEATHER)], f"Ok [CALLS][{call}, {call}]", free=True, parallel=False
    )


def test_strict_behind_a_special_token_begins_at_its_id() -> None:
    text = byte_text(SPECIAL)
    assert text.tool_form is not None
    tool = Tool.model_validate(strict(WEATHER))
    source = free_grammar(text, text.tool_form, [tool], parallel=True)
    matcher = TokenGrammars.of(text).compile(Constraint("grammar", source))
    for city, lawful in ((b'"Porto"', True), (b"7", False)):
        call = b'call\n{"name": "weather", "arguments": {"city": ' + city + b"}}</call>"
        tokens = [*b"Well, call ", START, *call, END]
        assert (matcher.allowed(tokens) == len(tokens)) is lawful


SAID = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"],
        "additionalProperties": False, "$defs": {"A": {"type": "integer"}}}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (MARKED, CALL),
        (BARE, '{"name": "weather", "parameters": {"city": "Porto"}}'),
        (LISTED, '[CALLS][{"function": {"name": "weather", "arguments": {"city": "Porto"}}}]'),
    ],
)
def test_beside_a_format_the_text_is_that_or_calls(template: str, call: str) -> None:
    for text in ('{"a": 1}', call):
        assert accepts(template, [strict(WEATHER)], text, free=True, answer=SAID)
    for text in ('{"a": "x"}', call.replace('"Porto"', "7"), "It rains.", "", call + '{"a": 1}'):
        assert not accepts(template, [strict(WEATHER)], text, free=True, answer=SAID)


def test_a_format_leaves_room_for_calls_and_is_refused_at_its_own_place(
    live: Live, journal: Path
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SAID}}
    choice(live, response_format=wanted)
    kind, source = entries(journal, "Submit")[-1]["constraint"]
    assert kind == "grammar"
    assert "answer" in source
    choice(live, response_format=wanted, tool_choice="none")
    assert entries(journal, "Submit")[-1]["constraint"][0] == "json_schema"
    choice(live, guided_regex="a+")
    assert entries(journal, "Submit")[-1]["constraint"] == ["regex", "a+"]
    place = "response_format.json_schema.schema"
    for bad, where in (({"not": {}}, ".not"), ({"type": "string", "pattern": "("}, "")):
        wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": bad}}
        assert chat(live, response_format=wrong).json()["error"]["param"] == place + where


def test_strict_is_a_constraint_and_a_function_without_it_none(live: Live, journal: Path) -> None:
    choice(live)
    assert entries(journal, "Submit")[-1]["constraint"] is None
    choice(live, tools=[strict(WEATHER), TIME])
    assert entries(journal, "Submit")[-1]["constraint"][0] == "grammar"
    choice(live, tools=[strict(WEATHER)], tool_choice="none")
    assert entries(journal, "Submit")[-1]["constraint"] is None
    broken = referring({"properties": {"a": {"uniqueItems": True}}}, strict=True)
    error = chat(live, tools=[broken]).json()["error"]
    assert error["param"] == "tools[0].function.parameters.properties.a.uniqueItems"


def test_a_mark_with_a_special_token_is_demanded_by_its_id() -> None:
    text = byte_text(SPECIAL)
    assert text.tool_form is not None
    source = call_grammar(text, text.tool_form, [Tool.model_validate(TIME)])
    matcher = TokenGrammars.of(text).compile(Constraint("grammar", source))
    tokens = [START, *b'call\n{"name": "time", "arguments": {}}</call>', END]
    assert matcher.allowed(tokens) == len(tokens)


def test_a_call_behind_a_special_token_is_read(tmp_path: Path) -> None:
    told = (START, *b'call\n{"name": "time", "arguments": {}}</call>', END)
    with live_server(tmp_path, Behaviour(says=told), byte_text(SPECIAL)) as live:
        answered = choice(live)
    assert [call["function"]["name"] for call in answered["message"]["tool_calls"]] == ["time"]
    assert answered["message"]["content"] is None


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "function": {"name": "time", "arguments": '{"zone": "é"}'}}],
}


ANSWERED = {"role": "tool", "tool_call_id": "a", "content": "12 o'clock"}


def test_a_template_gets_arguments_as_text_where_it_takes_them_so(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(says=(ord("."), END), journal=journal)
    with live_server(tmp_path / "store", behaviour, byte_text(TEXTUAL)) as live:
        choice(live, messages=[*ASK, CALLED])
    (submitted,) = entries(journal, "Submit")
    assert '"arguments": {"zone": "é"}}' in prompt_of(submitted)


def test_a_template_that_fails_in_its_own_code_refuses_the_messages(tmp_path: Path) -> None:
    with live_server(tmp_path, text=byte_text(BROKEN)) as live:
        response = live.post("/v1/chat/completions", {"model": BASE, "messages": ASK})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("template", [MARKED, TEXTUAL, BARE, LISTED])
def test_a_history_with_any_arguments_is_rendered(tmp_path: Path, template: str) -> None:
    with live_server(tmp_path, Behaviour(says=(ord("."), END)), byte_text(template)) as live:
        for arguments in ("", "{}", '{"city": "Po', "null", "[1]", '"x"', "no", "[" * 1500, None,
                          {"city": "Porto"}):  # fmt: skip
            call = {"id": "a", "type": "function",
                    "function": {"name": "weather", "arguments": arguments}}  # fmt: skip
            turn = {"role": "assistant", "content": None, "tool_calls": [call]}
            answered = chat(live, messages=[*ASK, turn, ANSWERED, *ASK])
            assert answered.status_code == 200, (arguments, answered.text)


def test_arguments_that_are_cut_off_stand_in_the_prompt_as_text_where_text_is_taken() -> None:
    text = byte_text(TEXTUAL)
    call = {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Po'}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert '"arguments": {"city": "Po}' in text.render_chat([*ASK, turn])


def test_a_stream_has_no_event_that_tells_nothing(live: Live) -> None:
    body = {"model": BASE, "messages": ASK, "tools": [WEATHER], "tool_choice": "required"}
    opening, *events, _ = live.events("/v1/chat/completions", body)
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    told = [event["choices"][0] for event in events]
    assert all(one["delta"] or one["finish_reason"] for one in told)
    assert len(told) < len(ANSWER) / 2
    told = live.events("/v1/chat/completions", body | {"logprobs": True})[1:-1]
    tokens = [token for event in told[:-1] for token in event["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == len(ANSWER)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_each_have_their_calls(live: Live, stream: bool) -> None:
    if not stream:
        body = {"model": BASE, "messages": ASK, "tools": [WEATHER], "n": 3, "logprobs": True}
        told = live.post("/v1/chat/completions", body).json()["choices"]
        calls = [one["message"]["tool_calls"] for one in told]
        assert all(len(one["logprobs"]["content"]) == len(ANSWER) for one in told)
    else:
        body = {"model": BASE, "messages": ASK, "tools": [WEATHER], "n": 3}
        *events, _ = live.events("/v1/chat/completions", body)
        told = [event["choices"][0] for event in events]
        deltas = [one for one in told if "tool_calls" in one["delta"]]
        named = [one for one in deltas if "id" in one["delta"]["tool_calls"][0]]
        assert sorted(one["index"] for one in named) == [0, 1, 2]
        calls = [one["delta"]["tool_calls"] for one in named]
    assert [[call["function"]["name"] for call in one] for one in calls] == [["weather"]] * 3
    assert len({call["id"] for one in calls for call in one}) == 3


def test_tokenize_counts_what_a_chat_with_tools_sends(live: Live, journal: Path) -> None:
    body = {"messages": [*ASK, CALLED, ANSWERED], "tools": [WEATHER, TIME]}
    live.post("/v1/chat/completions", {"model": BASE, **body}).raise_for_status()
    told = live.post("/tokenize", body).json()
    assert told["tokens"] == entries(journal, "Submit")[-1]["prompt"]
    assert live.post("/tokenize", {"prompt": "x", "tools": [TIME]}).status_code == 400


def test_a_stop_string_inside_a_call_leaves_what_was_written_of_it(live: Live) -> None:
    answered = choice(live, stop=["Porto"])
    (call,) = answered["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "'}
    answered = choice(live, stop=["weather"])
    assert answered["message"]["content"] == ANSWER[: ANSWER.index("weather")]
    assert answered["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_keeps_what_was_written_of_its_arguments(
    live: Live, stream: bool
) -> None:
    most = ANSWER.index("orto")  # a token a byte
    if not stream:
        answered = choice(live, max_tokens=most)
        (call,) = answered["message"]["tool_calls"]
        said = [call["function"]["arguments"]]
        ended = answered["finish_reason"]
    else:
        body = {"model": BASE, "messages": ASK, "tools": [WEATHER], "max_tokens": most}
        *events, _ = live.events("/v1/chat/completions", body)
        deltas = [event["choices"][0]["delta"] for event in events]
        said = [c["function"]["arguments"] for d in deltas for c in d.get("tool_calls", [])]
        ended = events[-1]["choices"][0]["finish_reason"]
    assert "".join(said) == '{"city": "P'
    assert ended == "length"


NAMED = {"type": "function", "function": {"name": "other"}}
UNENFORCED = {"type": "function", "function": {"name": "t", "parameters": {"unheardOf": 1}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "browser"}]}, "tools[0].type"),
        (
            {"tools": [UNENFORCED], "tool_choice": "required"},
            "tools[0].function.parameters.unheardOf",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}, *ASK]}, None),
        ({"messages": [{"role": "assistant"}, *ASK]}, None),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"function": {}}}, "tool_choice.function.name"),
    ],
)
def test_a_wrong_field_is_refused_by_its_place(
    live: Live, fields: dict[str, Any], param: str | None
) -> None:
    response = chat(live, **fields)
    if param is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_model_whose_template_has_no_tools_refuses_them(tmp_path: Path) -> None:
    with live_server(tmp_path, text=byte_text()) as live:
        response = chat(live)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "tools"
        assert "takes no tools" in error["message"]
        answered = [*ASK, {"role": "tool", "tool_call_id": "a", "content": "x"}]
        assert chat(live, tools=[], messages=answered).json()["error"]["param"] == "messages"
