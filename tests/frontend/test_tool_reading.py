"""Tool calls read back from what a model writes, however its text is cut into pieces."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_support import byte_text
from tool_models import TOOLS, form_of, model_text, parsed, read, turn
from tool_templates import BARE, KEYED, LINES, LISTED, MARKED, NUMBERED, TAGGED

from quickchange_server.frontend.parsing.tool_forms import JsonCall, ToolForm
from quickchange_server.frontend.parsing.tool_parser import ToolReader
from quickchange_server.frontend.templates.chat_template import Rendering

HERMES = ToolForm(JsonCall(("name",), ("arguments",)), open="<tool_call>\n", close="\n</tool_call>")
LIST = ToolForm(JsonCall(("name",), ("arguments",), listed=True), open="[CALLS]")
LLAMA = ToolForm(JsonCall(("name",), ("parameters",)), several=False)


def own(template: str) -> ToolForm:
    form = byte_text(template).tool_form
    assert form is not None
    return form


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_text_before_a_call_stays_text() -> None:
    said, calls = read(HERMES, ["Let me look. " + written("weather", '{"city": "Porto"}')])
    assert said == "Let me look. "
    assert calls == [("weather", '{"city": "Porto"}')]


def test_blanks_between_calls_are_no_text_and_text_behind_them_is() -> None:
    text = written("weather", "{}") + "\n\n" + written("time", "{}") + "\n"
    said, calls = read(HERMES, [text])
    assert (said, [name for name, _ in calls]) == ("", ["weather", "time"])
    assert read(HERMES, [text + "Done."])[0] == "\nDone."


def test_a_list_of_calls_is_several() -> None:
    items = [{"name": name, "arguments": {"n": 1}} for name in TOOLS]
    assert parsed(read(LIST, ["[CALLS]" + json.dumps(items)])[1]) == [(n, {"n": 1}) for n in TOOLS]


def test_a_list_or_one_call_is_read_whichever_the_form_has() -> None:
    one = {"name": "time", "arguments": {}}
    assert read(LIST, ["[CALLS]" + json.dumps(one)]) == ("", [("time", "{}")])
    text = f"<tool_call>{json.dumps([one, one])}</tool_call>"
    assert read(HERMES, [text]) == ("", [("time", "{}")] * 2)


@pytest.mark.parametrize("between", ["", "; ", ", ", "\n"])
def test_bare_calls_one_behind_the_other_are_several(between: str) -> None:
    one = '{"name": "time", "parameters": {}}'
    assert read(LLAMA, [one + between + one]) == ("", [("time", "{}")] * 2)


def test_a_bare_answer_that_is_no_call_is_text() -> None:
    assert read(LLAMA, ["It is ", "sunny."]) == ("It is sunny.", [])
    assert read(LLAMA, ['{"weather": "sun', 'ny"}']) == ('{"weather": "sunny"}', [])
    pythonic = form_of("vllm_llama3.2_pythonic")
    for text in ("[1] says so", "[weather] is fine", "[other(a=1)]", "It is [weather(city=1)]"):
        assert read(pythonic, [text]) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": 3}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}, "name": "unknown"}</tool_call>',
        "<tool_call>weather(Porto)</tool_call> and more",
        '<tool_call>{"name": "weather", "argum',
        '<tool_call>{"name": "weather", "arguments": ',
        "<tool_ca",
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    assert read(HERMES, [text]) == (text, [])
    assert read(HERMES, [*text]) == (text, [])


def test_a_call_behind_what_is_none_is_read() -> None:
    text = "<tool_call> is the mark: " + written("time", '{"zone": "WET"}')
    said, calls = read(HERMES, [text])
    assert said == "<tool_call> is the mark: "
    assert calls == [("time", '{"zone": "WET"}')]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>{"name": "time", "arguments": {"zone": "W', '{"zone": "W'),
        ('<tool_call>{"name": "time", "arguments": {', "{"),
        ('<tool_call>{"name": "time", "arguments": {"a": oops}}</tool_call>', '{"a": oops}'),
        ('<tool_call>{"name": "time", "arguments": {}}</tool_c', "{}"),
        ('<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', '{"a": 1}'),
    ],
)
def test_arguments_are_as_far_as_they_were_written(text: str, arguments: str) -> None:
    assert read(HERMES, [text]) == ("", [("time", arguments)])


def test_json_arguments_are_the_models_own_text() -> None:
    arguments = '{ "city":"S\\u00e3o",\n "days" : 1.50e0 }'
    assert read(HERMES, [written("weather", arguments)])[1] == [("weather", arguments)]


def test_the_name_is_told_before_the_arguments_are_complete() -> None:
    reader = ToolReader(HERMES, TOOLS)
    _, told = reader.push('<tool_call>{"name": "time", "arguments": {', final=False)
    assert [(piece.index, piece.name, piece.arguments) for piece in told] == [(0, "time", "{")]
    _, told = reader.push('"zone": "W', final=False)
    assert [(piece.index, piece.name, piece.arguments) for piece in told] == [
        (0, None, '"zone": "W')
    ]


QWEN = "<tool_call>\n<function=weather>\n<parameter=city>\n"


def test_a_text_parameter_is_told_as_it_grows() -> None:
    reader = ToolReader(form_of("qwen3_coder"), TOOLS)
    grown = [reader.push(text, final=False)[1] for text in (QWEN, "Por", 'to "', "\n</para")]
    assert grown[0][0].name == "weather"
    assert "".join(piece.arguments for told in grown for piece in told) == '{"city": "Porto \\"'
    _, told = reader.push("meter>\n</function>\n</tool_call>", final=True)
    assert "".join(piece.arguments for piece in told) == '"}'


@pytest.mark.parametrize(
    ("rest", "arguments"),
    [
        ("Por", '{"city": "Por'),
        ("Porto\n</param", '{"city": "Porto\\n</param'),
        ("Porto\n</parameter>\n<parameter=days>\n3", '{"city": "Porto", "days": 3'),
        ("Porto\n</parameter>\n<param", '{"city": "Porto"'),
        ("Porto\n</parameter>\n</function>", '{"city": "Porto"}'),
    ],
)
def test_parameters_that_are_cut_off_are_as_far_as_they_were_written(
    rest: str, arguments: str
) -> None:
    assert read(form_of("qwen3_coder"), [QWEN + rest]) == ("", [("weather", arguments)])


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "object": {"$ref": "#/$defs/o"},
        "flag": {"type": "boolean"},
    },
    "$defs": {"o": {"type": "object"}},
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "  two\n lines ", "  two\n lines "),
        ("number", "3", 3),
        ("number", "1.5", 1.5),
        ("number", "many", "many"),
        ("maybe", "null", None),
        ("maybe", "12345", "12345"),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("object", '{"a": [true]}', {"a": [True]}),
        ("object", "{'a': [True, None]}", {"a": [True, None]}),
        ("flag", "True", True),
        ("flag", "false", False),
        ("unknown", "7", 7),
        ("unknown", "seven", "seven"),
    ],
)
def test_a_parameters_text_is_typed_by_the_schema(key: str, text: str, value: Any) -> None:
    said = f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    _, calls = read(form_of("qwen3_coder"), [said], {"f": SCHEMA})
    assert parsed(calls) == [("f", {key: value})]


@pytest.mark.parametrize("schema", [{}, {"properties": 5}, {"$ref": "#"}, {"$ref": 5}, {"type": 5},
                                    {"properties": {"a": {"enum": 3, "anyOf": [5]}}}])  # fmt: skip
def test_a_schema_that_makes_no_sense_types_nothing(schema: dict[str, Any]) -> None:
    said = "<tool_call>\n<function=f>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    assert parsed(read(form_of("qwen3_coder"), [said], {"f": schema})[1]) == [("f", {"a": 3})]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'it is'", "it is"),
        ('"it\'s \\n"', "it's \n"),
        ("3", 3),
        ("-2.5", -2.5),
        ("True", True),
        ("null", None),
        ("[1, (2, 'x')]", [1, [2, "x"]]),
        ('{"a": {"b": [")", "]"]}}', {"a": {"b": [")", "]"]}}),
        ("Porto", "Porto"),
        ("open('/etc')", "open('/etc')"),
    ],
)
def test_python_values_are_read_as_literals_and_never_run(text: str, value: Any) -> None:
    _, calls = read(form_of("vllm_llama3.2_pythonic"), [f"[f(x={text}, y=1)]"], {"f": {}})
    assert parsed(calls) == [("f", {"x": value, "y": 1})]


FORMS = {
    "hermes": HERMES,
    "list": LIST,
    "bare": own(BARE),
    "listed": own(LISTED),
    "lines": own(LINES),
    "keyed": own(KEYED),
    "tagged": own(TAGGED),
    "numbered": own(NUMBERED),
}
TEMPLATES = {"hermes": MARKED, "bare": BARE, "listed": LISTED, "lines": LINES, "keyed": KEYED,
             "tagged": TAGGED, "numbered": NUMBERED}  # fmt: skip
PUBLIC = ("qwen3_coder", "glm4.6", "minimax_m2", "deepseek_v3.2", "lfm2.5", "vllm_deepseekv3",
          "mistral_small3.2", "kimi_k2", "solar_open", "minimax_m1", "functionary3.1",
          "vllm_llama3.2_pythonic")  # fmt: skip


@cache
def sample(name: str) -> str:
    calls = [("weather", {"city": "Po<r", "days": 3}), ("time", {"zone": "WET"})]
    return turn(name, calls)


@settings(deadline=None)
@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(PUBLIC))
    form = form_of(name)
    whole = sample(name)
    parts = st.one_of(
        st.text("ab <{[\"'\n)}]", max_size=8),
        st.just(whole),
        st.integers(0, len(whole)).map(lambda end: whole[:end]),
        st.integers(0, len(whole)).map(lambda start: whole[start:]),
        st.sampled_from([mark for mark in form.marks if mark.isprintable()] or ["x"]),
    )
    text = "".join(data.draw(st.lists(parts, max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == read(form, [text])
    assert read(form, [*text]) == read(form, [text])


@pytest.mark.parametrize("behind", ["", " ", "\n", "a ", " a", "< ", "a\n"])
def test_blanks_behind_a_call_are_text_only_with_text(behind: str) -> None:
    form, whole = form_of("vllm_llama3.2_pythonic"), sample("vllm_llama3.2_pythonic")
    content, calls = read(form, [whole + behind])
    assert content == (behind if behind.strip() else "")
    assert len(calls) == 2
    assert read(form, [whole, *behind]) == read(form, [*whole, behind]) == (content, calls)


VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")).map(str),
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.lists(st.integers(0, 9), max_size=3),
)


@settings(deadline=None)
@given(st.data())
def test_json_calls_of_any_arguments_are_read_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["hermes", "keyed", "listed", "numbered"]))
    text = byte_text(TEMPLATES[name])
    arguments = data.draw(st.dictionaries(st.text("abc_", min_size=1), VALUES, max_size=3))
    called = {"id": "call00000", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [called]}
    how = Rendering(add_generation_prompt=False)
    rendered = text.render_chat([{"role": "user", "content": "."}, message], how=how)
    mark = FORMS[name].mark
    said, calls = read(FORMS[name], [rendered[rendered.index(mark) :]])
    assert said.strip() == "<|im_end|>"
    assert parsed(calls) == [("weather", arguments)]


def test_reading_takes_a_time_that_grows_with_the_text_alone() -> None:
    text = '<tool_call>{"arguments": {"a": "' * 3000
    said, calls = read(HERMES, [text])
    assert (said, calls) == (text, [])
    assert model_text("qwen3").tool_form is not None
