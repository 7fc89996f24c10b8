"""Thoughts over HTTP: their own fields, streams, usage, and constraints that hold behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_template_files import chat_template
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from text_support import END, START, byte_text
from tool_templates import MARKED

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import TokenGrammars

ASK = [{"role": "user", "content": "1 + 1?"}]
SAID = "<think>\nHm, 2.\n</think>\n\nTwo."
URL = "/v1/chat/completions"


def says(text: str, journal: Path | None = None) -> Behaviour:
    return Behaviour(says=(*text.encode(), END), journal=journal)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("thoughts") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    text = byte_text(chat_template("thinks_in_field"))
    with live_server(journal.parent / "store", says(SAID, journal), text) as live:
        yield live


def answered(live: Live, **fields: Any) -> Any:
    response = live.post(URL, {"model": BASE, "messages": ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def message(live: Live, **fields: Any) -> Any:
    return answered(live, **fields)["choices"][0]["message"]


def streamed(live: Live, **fields: Any) -> list[Any]:
    return [
        choice["delta"]
        for event in live.events(URL, {"model": BASE, "messages": ASK, **fields})[:-1]
        for choice in event["choices"]
    ]


def prompt_of(submitted: dict[str, Any]) -> str:
    return bytes(token for token in submitted["prompt"] if token < 256).decode()


def test_a_thought_has_its_own_fields(live: Live) -> None:
    told = message(live)
    assert told["content"] == "Two."
    assert told["reasoning"] == told["reasoning_content"] == "Hm, 2."


def test_a_stream_tells_the_thought_and_then_the_answer(live: Live) -> None:
    deltas = streamed(live)
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Two."
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Hm, 2."
    thinking = [index for index, delta in enumerate(deltas) if "reasoning" in delta]
    saying = [index for index, delta in enumerate(deltas) if delta.get("content")]
    assert max(thinking) < min(saying)


def test_a_thought_can_be_left_out(live: Live) -> None:
    whole = answered(live, include_reasoning=False, logprobs=True, return_token_ids=True)
    told = whole["choices"][0]
    assert told["message"] == {"role": "assistant", "content": "Two.", "refusal": None}
    assert told["logprobs"] is None  # it would spell the thought,
    assert told["token_ids"] is None  # as would these
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("\nHm, 2.\n")
    deltas = streamed(live, include_reasoning=False)
    assert not any("reasoning" in delta for delta in deltas)
    assert "".join(delta.get("content") or "" for delta in deltas) == "Two."


def test_the_usage_counts_the_tokens_of_thoughts(live: Live) -> None:
    thought = len("\nHm, 2.\n")  # a token is a byte
    assert answered(live, n=2)["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": 2 * thought
    }
    options = {"include_usage": True}
    body = {"model": BASE, "messages": ASK, "stream": True, "stream_options": options}
    usage = live.events(URL, body)[-2]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}


def test_an_answer_cut_off_in_its_thought_has_no_content(live: Live) -> None:
    choice = answered(live, max_tokens=12)["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "Hm,"
    assert choice["finish_reason"] == "length"


def test_a_thought_that_is_switched_off_is_none(live: Live, journal: Path) -> None:
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}},
                   {"reasoning_effort": "none"}):  # fmt: skip
        told = message(live, **fields)
        assert "reasoning" not in told
        assert told["content"] == SAID  # what the model writes in spite of it
        assert prompt_of(entries(journal, "Submit")[-1]).endswith("<think>\n\n</think>\n\n")
    message(live, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(entries(journal, "Submit")[-1]).endswith("</think>\n\n")  # as said by name


def test_an_earlier_thought_stands_in_the_prompt(live: Live, journal: Path) -> None:
    for name in ("reasoning", "reasoning_content"):
        last = {"role": "assistant", "content": "Tw", name: "Easy."}
        message(live, messages=[*ASK, last], continue_final_message=True)
        prompt = prompt_of(entries(journal, "Submit")[-1])
        assert prompt.endswith("assistant\n<think>\nEasy.\n</think>\n\nTw")


def test_thoughts_as_parts_of_a_content_are_thoughts(live: Live, journal: Path) -> None:
    parts = [{"type": "thinking", "thinking": "Easy."}, {"type": "text", "text": "Tw"}]
    last = {"role": "assistant", "content": parts}
    message(live, messages=[*ASK, last], continue_final_message=True)
    prompt = prompt_of(entries(journal, "Submit")[-1])
    assert prompt.endswith("assistant\n<think>\nEasy.\n</think>\n\nTw")
    refused = live.post(URL, {"model": BASE, "messages": [{"role": "user", "content": parts}]})
    assert refused.json()["error"]["param"] == "messages[0].content"


def test_a_last_thought_goes_on_as_a_thought(tmp_path: Path) -> None:
    text = byte_text(chat_template("thinks_always"))
    journal = tmp_path / "journal"
    with live_server(tmp_path / "store", says("y.\n</think>\n\nTwo.", journal), text) as live:
        told = message(
            live,
            messages=[*ASK, {"role": "assistant", "reasoning": "Eas"}],
            continue_final_message=True,
        )
        assert prompt_of(entries(journal, "Submit")[-1]).endswith("<think>\nEas")
        assert (told["reasoning"], told["content"]) == ("y.", "Two.")
        told = message(
            live,
            messages=[*ASK, {"role": "assistant", "content": "<think>Eas"}],
            continue_final_message=True,
            echo=False,
        )
        assert (told["reasoning"], told["content"]) == ("y.", "Two.")


def test_a_thought_that_the_prompt_begins_is_told_apart(tmp_path: Path) -> None:
    text = byte_text(chat_template("thinks_taken_out"))
    with live_server(tmp_path, says("Hm.\n</think>\nTwo."), text) as live:
        told = message(live)
        assert (told["reasoning"], told["content"]) == ("Hm.", "Two.")


def test_marks_that_are_special_tokens_are_read_and_not_told(tmp_path: Path) -> None:
    said = (START, *b"think Hm.", START, *b"done Two.", END)
    text = byte_text(chat_template("thinks_with_special_tokens"))
    with live_server(tmp_path, Behaviour(says=said), text) as live:
        told = message(live)
        assert (told["reasoning"], told["content"]) == ("Hm.", "Two.")


def test_without_marks_in_the_template_nothing_is_split(tmp_path: Path) -> None:
    with live_server(tmp_path, says(SAID), byte_text(MARKED)) as live:
        whole = answered(live)
        assert whole["choices"][0]["message"]["content"] == SAID
        assert "completion_tokens_details" not in whole["usage"]


def test_a_call_behind_a_thought_is_a_call(tmp_path: Path) -> None:
    template = chat_template("thinks_in_field").replace(
        "{{ m.content }}<|im_end|>",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "</tool_call>{% endfor %}<|im_end|>",
    )
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    said = f"<think>I call {call} now</think>{call}"
    text = byte_text("{{ tools | tojson if tools }}" + template)
    with live_server(tmp_path, says(said), text) as live:
        told = message(live, tools=[tool])
        assert told["reasoning"] == f"I call {call} now"
        assert [one["function"]["name"] for one in told["tool_calls"]] == ["add"]


# --- constraints ---------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_json": SCHEMA}, '{"a": 1}', '{"b'),
    ({"response_format": {"type": "json_object"}}, '{"a": "x"}', "x"),
    ({"guided_regex": "a/+b"}, "a//b", "b"),
    ({"guided_choice": ["yes", "no"]}, "yes", "never"),
    ({"guided_grammar": 'start: "x" thought\nthought: "y"'}, "xy", "y"),
]


THOUGHTS = {  # a thought with what stands behind it
    "thinks_in_field": "<think>no {} rule</think>\n\n",
    "thinks_always": "no {} rule</think>\n\n",
    "thinks_in_channels": "<|channel|>analysis<|message|>no {} rule<|end|>"
    "<|start|>assistant<|channel|>final<|message|>",
    "thinks_with_special_tokens": "<|im_start|>think no {} rule<|im_start|>done ",
}


@pytest.mark.parametrize("template", THOUGHTS)
def test_a_constraint_holds_behind_the_thought(tmp_path: Path, template: str) -> None:
    text = byte_text(chat_template(template))
    journal = tmp_path / "journal"
    grammars = TokenGrammars.of(text)
    with live_server(tmp_path / "store", says("x", journal), text) as live:
        for fields, right, wrong in FORMS:
            answered(live, **fields, max_tokens=1)
            submitted = entries(journal, "Submit")[-1]
            matcher = grammars.compile(Constraint(*submitted["constraint"]))
            for answer, complete in ((right, True), (wrong, False)):
                ids = text.encode_now(THOUGHTS[template] + answer)
                assert (matcher.copy().allowed([*ids, END]) == len(ids) + 1) is complete, answer
            alone = text.encode_now(right)  # without a thought, unless the prompt has begun one
            begun = template == "thinks_always"
            assert (matcher.allowed([*alone, END]) == len(alone) + 1) is not begun


def test_a_wrong_schema_is_told_at_its_place_behind_a_thought(live: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": "x"}}}
    response = live.post(URL, {"model": BASE, "messages": ASK, "guided_json": schema})
    assert response.status_code == 400
    assert "guided_json.properties.a" in json.dumps(response.json())
