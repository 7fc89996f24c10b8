"""Forms of tool calls: learned from chat templates, of test models and of public ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from text_support import CHAT_TEMPLATE, byte_text
from tool_models import (
    NAMES,
    ONE_CALL,
    REFUSED,
    form_of,
    history,
    model_text,
    parsed,
    read,
    tools_for_template,
    turn,
)
from tool_templates import (
    BARE,
    BROKEN,
    KEYED,
    LINES,
    LISTED,
    MARKED,
    NUMBERED,
    SPECIAL,
    TAGGED,
    TEXTUAL,
    THINKING,
    TWICE,
    UNCLOSED,
)

from quickchange_server.frontend.parsing.tool_forms import (
    KEY,
    OWN,
    JsonCall,
    NamedCall,
    ParameterMarks,
    ToolForm,
)

JSON = JsonCall(("name",), ("arguments",))
HERMES = ToolForm(JSON, open="<tool_call>\n", close="\n</tool_call>")


def learned(template: str) -> ToolForm | None:
    return byte_text(template).tool_form


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (MARKED, HERMES),
        (BARE, ToolForm(JsonCall(("name",), ("parameters",)), several=False)),
        (
            LISTED,
            ToolForm(
                JsonCall(("function", "name"), ("function", "arguments"), listed=True),
                open="[CALLS]",
            ),
        ),
        (THINKING, HERMES),
        (TEXTUAL, replace(HERMES, from_text=True)),
        (
            SPECIAL,
            ToolForm(JSON, open="<|im_start|>call\n", close="</call>", several=False),
        ),
        (NUMBERED, replace(HERMES, open=f"<tool_call id={OWN}>\n")),
        (
            TAGGED,
            ToolForm(
                NamedCall(">", ParameterMarks("<", ((">", "either"),), f"</{KEY}>")),
                open="<call name=",
                close="</call>",
            ),
        ),
        (
            LINES,
            ToolForm(
                NamedCall("(", "python"),
                begin="<function_calls>",
                open="\n",
                end="\n</function_calls>",
            ),
        ),
        (
            KEYED,
            ToolForm(
                NamedCall('": ', "json"),
                begin="<tools>[",
                open='{"',
                close="}",
                separator=", ",
                end="]</tools>",
            ),
        ),
    ],
    ids=["marked", "bare", "listed", "thinking", "textual", "special", "numbered", "tagged",
         "lines", "keyed"],
)  # fmt: skip
def test_the_form_is_the_templates_own(template: str, form: ToolForm) -> None:
    assert learned(template) == form


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, BROKEN, TWICE, UNCLOSED],
    ids=["no tools", "broken", "the name twice", "values without an end"],
)
def test_a_template_whose_calls_cannot_be_recognised_has_no_form(template: str) -> None:
    assert learned(template) is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_public_template_without_calls_that_can_be_read_back_has_no_form(name: str) -> None:
    assert model_text(name).tool_form is None


ARGUMENTS: dict[str, Any] = {
    "city": "Porto",
    "days": 3,
    "exact": True,
    "where": {"lat": 41.5, "sea": False},
    "kinds": ["rain", "wind"],
}
CALLS = [("weather", ARGUMENTS), ("time", {"zone": "WET"}), ("weather", {"city": "São Tomé"})]
# Its template writes no commas between the arguments, which only strings survive.
STRINGS = [("weather", {"city": "Porto"}), ("time", {"zone": "WET"})]


def calls_of(name: str) -> list[tuple[str, dict[str, Any]]]:
    calls = STRINGS if name == "vllm_gemma3_pythonic" else CALLS
    return calls[:1] if name in ONE_CALL else calls


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_a_public_template_writes_are_read_as_they_were(name: str) -> None:
    written = turn(name, calls_of(name))
    for pieces in ([written], [*written]):
        said, calls = read(form_of(name), pieces)
        assert said.strip() == ""
        assert parsed(calls) == calls_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_history_of_calls_and_results_is_rendered_by_a_public_template(name: str) -> None:
    rendered = model_text(name).render_chat(history(calls_of(name)[:1]), tools=tools_for_template())
    assert "Rain in Porto?" in rendered
    assert rendered.index("Rain in Porto?") < rendered.rindex("weather")
    assert "12 mm" in rendered


@pytest.mark.parametrize("name", NAMES)
def test_text_before_a_call_stays_text_where_calls_have_a_mark(name: str) -> None:
    form = form_of(name)
    said, calls = read(form, ["Let me look. " + turn(name, calls_of(name)[:1])])
    assert said.startswith("Let me look. ")
    if form.mark:
        assert said.strip() == "Let me look."
        assert parsed(calls) == calls_of(name)[:1]
    else:
        assert calls == []


def test_harmonys_header_is_read_as_the_model_writes_it() -> None:
    header = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    _, calls = read(form_of("gpt_oss"), [header + '{"city": "Porto"}'])
    assert parsed(calls) == [("weather", {"city": "Porto"})]
