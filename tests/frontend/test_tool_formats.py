"""Tool calls: the form is learned from a chat template, and read back from what a model writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_support import CHAT_TEMPLATE, byte_text
from tool_templates import (
    BARE,
    BROKEN,
    LISTED,
    MARKED,
    NUMBERED,
    SPECIAL,
    TAGGED,
    TEXTUAL,
    THINKING,
)

from quickchange_server.frontend.parsing.tool_parser import ToolCall, ToolFormat, ToolReader

HERMES = ToolFormat("<tool_call>", "</tool_call>", False, ("name",), ("arguments",))
NAMES = ("weather", "time")


def learned(template: str) -> ToolFormat | None:
    return byte_text(template).tool_format


def read(form: ToolFormat, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolReader(form, NAMES)
    said, calls = "", []
    for index, piece in enumerate(pieces):
        text, found = reader.push(piece, final=index == len(pieces) - 1)
        said += text
        calls += found
    return said, calls


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (MARKED, HERMES),
        (BARE, ToolFormat("", "", False, ("name",), ("parameters",))),
        (
            LISTED,
            ToolFormat("[CALLS]", "", True, ("function", "name"), ("function", "arguments")),
        ),
        (THINKING, HERMES),
        (TEXTUAL, replace(HERMES, from_text=True)),
        (SPECIAL, replace(HERMES, begin="<|im_start|>call", end="</call>")),
    ],
    ids=["marked", "bare", "listed", "thinking", "textual", "special"],
)
def test_the_form_is_the_templates_own(template: str, form: ToolFormat) -> None:
    assert learned(template) == form


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, TAGGED, NUMBERED, BROKEN],
    ids=["no tools", "no JSON", "marks that differ", "broken"],
)
def test_a_template_whose_calls_cannot_be_recognised_has_no_form(template: str) -> None:
    assert learned(template) is None


def test_text_before_a_call_stays_text() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call>'
    said, calls = read(HERMES, ["Let me look. " + call])
    assert said == "Let me look. "
    assert calls == [ToolCall("weather", '{"city": "Porto"}')]


def test_several_calls_are_read_one_by_one() -> None:
    text = "".join(
        f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>\n' for name in NAMES
    )
    said, calls = read(HERMES, [text])
    assert [call.name for call in calls] == list(NAMES)
    assert said.strip() == ""


def test_a_list_of_calls_is_several() -> None:
    form = ToolFormat("[CALLS]", "", True, ("name",), ("arguments",))
    items = [{"name": name, "arguments": {"n": 1}} for name in NAMES]
    _, calls = read(form, ["[CALLS]" + json.dumps(items)])
    assert [call.name for call in calls] == list(NAMES)


def test_a_bare_answer_that_is_no_call_is_text() -> None:
    form = ToolFormat("", "", False, ("name",), ("parameters",))
    assert read(form, ["It is ", "sunny."]) == ("It is sunny.", [])
    assert read(form, ['{"weather": "sun', 'ny"}']) == ('{"weather": "sunny"}', [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": 3}</tool_call>',
        "<tool_call>weather(Porto)</tool_call> and more",
        '<tool_call>{"name": "weather", "argum',
        "<tool_ca",
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    assert read(HERMES, [text]) == (text, [])
    assert read(HERMES, list(text)) == (text, [])


@given(
    st.lists(
        st.one_of(
            st.text("ab <{\"'", max_size=8),
            st.sampled_from(
                [
                    '<tool_call>{"name": "time", "arguments": {"z": "</tool_call>"}}</tool_call>',
                    '<tool_call>\n{"name": "weather", "arguments": {"a": [1, {}]}}\n</tool_call>',
                    "<tool_call>{}</tool_call>",
                    '<tool_call>{"name": time}</tool_call>',
                ]
            ),
        ),
        max_size=5,
    ),
    st.data(),
)
def test_pieces_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(HERMES, pieces) == read(HERMES, [text])
