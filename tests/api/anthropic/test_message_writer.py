"""A message's blocks: the events that they come as, and what these add up to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.api.anthropic.message_responses import MessageWriter
from quickchange_server.frontend.parsing.message_reader import CallPiece, MessagePiece


def call(name: str | None, arguments: str, index: int = 0) -> MessagePiece:
    return MessagePiece(calls=(CallPiece(index, name, arguments),))


def written(pieces: Sequence[MessagePiece], **options: Any) -> tuple[list[Any], list[Any]]:
    """The events and the whole content."""
    writer = MessageWriter(**options)
    events = [event for piece in pieces for event in writer.push(piece)]
    events += writer.finish()
    return events, writer.content


def added_up(events: Sequence[Any]) -> list[Any]:
    """The content as Anthropic's client adds it up; checks the order of the events."""
    content: list[Any] = []
    inputs: dict[int, str] = {}
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(content)
                content.append(dict(event["content_block"]))
                is_open = True
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(content) - 1
                block, delta = content[-1], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        index = event["index"]
                        inputs[index] = inputs.get(index, "") + delta["partial_json"]
            case "content_block_stop":
                assert is_open
                assert event["index"] == len(content) - 1
                is_open = False
    assert not is_open
    for index, text in inputs.items():
        content[index]["input"] = json.loads(text)
    return content


WORDS = st.text("ab \n", max_size=4)
PIECES = st.lists(
    st.one_of(
        WORDS.map(MessagePiece),
        WORDS.map(lambda text: MessagePiece(reasoning=text)),
        st.tuples(WORDS, WORDS).map(lambda two: MessagePiece(two[0], two[1])),
        st.sampled_from(["{}", '{"a": 1}', '{"b": "\\n"}']).map(lambda text: call("f", text)),
    ),
    max_size=8,
)


@given(PIECES)
def test_the_events_add_up_to_the_whole_message(pieces: list[MessagePiece]) -> None:
    events, content = written(pieces)
    assert added_up(events) == content
    assert content


@given(PIECES)
def test_no_text_before_another_block_is_blank_or_ends_in_blanks(
    pieces: list[MessagePiece],
) -> None:
    _, content = written(pieces)
    before = [block["text"] for block in content[:-1] if block["type"] == "text"]
    assert all(text and text == text.rstrip() for text in before)


@given(st.lists(WORDS, max_size=6))
def test_text_alone_comes_back_as_it_is(texts: list[str]) -> None:
    _, content = written([MessagePiece(text) for text in texts])
    assert content == [{"type": "text", "text": "".join(texts)}]


def test_each_kind_of_piece_gets_a_block() -> None:
    pieces = [
        MessagePiece(reasoning="Rain "),
        MessagePiece(reasoning="there?"),
        MessagePiece("\nOne "),
        MessagePiece("moment.\n"),
        call("weather", '{"city": '),
        call(None, '"Porto"}'),
        call("time", "{}", 1),
    ]
    _, content = written(pieces)
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "tool_use"]
    assert content[0]["thinking"] == "Rain there?"
    assert content[0]["signature"]
    assert content[1]["text"] == "\nOne moment."
    assert (content[2]["name"], content[2]["input"]) == ("weather", {"city": "Porto"})
    assert (content[3]["name"], content[3]["input"]) == ("time", {})
    assert content[2]["id"] != content[3]["id"]


def test_reasoning_that_is_to_be_omitted_leaves_an_empty_signed_block() -> None:
    events, (block, _) = written(
        [MessagePiece(reasoning="Hm."), MessagePiece("Yes.")], show_thinking=False
    )
    assert block["thinking"] == ""
    assert block["signature"]
    kinds = [event["delta"]["type"] for event in events if "delta" in event]
    assert kinds == ["signature_delta", "text_delta"]


@pytest.mark.parametrize(
    ("arguments", "whole", "taken"),
    [
        ('{"a": 1}', True, {"a": 1}),
        ('{"a": 1, "b', False, {"a": 1}),
        ('{"a": ["x", "y', False, {"a": ["x"]}),
        ("", False, {}),
        ("[1]", False, {}),
        ("what", False, {}),
    ],
)
def test_of_a_call_that_was_cut_off_what_is_certain_is_told(
    arguments: str, whole: bool, taken: dict[str, Any]
) -> None:
    writer = MessageWriter()
    for _ in writer.push(call("f", arguments)):
        pass
    for _ in writer.finish():
        pass
    assert writer.whole_call is whole
    assert writer.content[0]["input"] == taken
