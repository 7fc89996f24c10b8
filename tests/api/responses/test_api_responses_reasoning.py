"""Reasoning in /v1/responses: an item of its own, whole and streamed, and given back as input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_template_files import chat_template
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from text_support import END, byte_text

THOUGHT, SAID = "Two and two.", "Four."


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reasoning") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    says = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
    behaviour = Behaviour(says=(*says.encode(), END), journal=journal)
    text = byte_text(chat_template("thinks_in_field"))
    with live_server(journal.parent / "store", behaviour, text) as live:
        yield live


def answered(live: Live, **fields: Any) -> Any:
    response = live.post("/v1/responses", {"model": BASE, "input": "2 + 2?", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": BASE, "input": "2 + 2?", "stream": True, **fields}
    with live.http.stream("POST", "/v1/responses", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_reasoning_is_an_item_before_the_message(live: Live) -> None:
    told = answered(live)
    reasoning, message = told["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["id"].startswith("rs_")
    assert reasoning["summary"] == []
    (part,) = reasoning["content"]
    assert part == {"type": "reasoning_text", "text": THOUGHT}
    assert message["content"][0]["text"].strip() == SAID
    details = told["usage"]["output_tokens_details"]
    assert len(THOUGHT) <= details["reasoning_tokens"] < told["usage"]["output_tokens"] - len(SAID)


def test_reasoning_streams_before_the_text(live: Live) -> None:
    told = streamed(live)
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in told))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.delta", "output_text.done", "completed"),
    ]
    deltas = [e["delta"] for e in told if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT
    final = told[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
    assert final["usage"] == answered(live)["usage"]


def test_reasoning_that_is_not_wanted_is_left_out(live: Live) -> None:
    told = answered(live, include_reasoning=False)
    assert [item["type"] for item in told["output"]] == ["message"]
    assert told["output"][0]["content"][0]["text"].strip() == SAID
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] >= len(THOUGHT)


def test_an_answer_cut_off_amid_its_reasoning_has_an_incomplete_item(live: Live) -> None:
    told = answered(live, max_output_tokens=len("<think>\nTwo"))
    (reasoning,) = told["output"]
    assert (reasoning["type"], reasoning["status"]) == ("reasoning", "incomplete")
    assert told["status"] == "incomplete"


def test_reasoning_is_given_back_to_the_template(live: Live, journal: Path) -> None:
    output = answered(live)["output"]
    for items in (output, [output[0], {**output[1], "content": "Four."}]):
        answered(live, input=[{"role": "user", "content": "2 + 2?"}, *items])
        ids: Any = entries(journal, "Submit")[-1]["prompt"]
        prompt = bytes(token for token in ids if token < 256).decode()
        assert THOUGHT in prompt
        assert prompt.index(THOUGHT) < prompt.index(SAID)
    answered(live, input=[{"role": "user", "content": "?"}, output[0]])  # alone, it is answered too


def test_log_probabilities_are_those_of_the_text(live: Live) -> None:
    include = ["message.output_text.logprobs"]
    message = answered(live, include=include)["output"][1]
    text = "".join(entry["token"] for entry in message["content"][0]["logprobs"])
    assert text.strip() == SAID
    assert THOUGHT not in text
