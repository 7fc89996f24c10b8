"""Thoughts: their marks are learned from a chat template, and read back from a model's text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from chat_template_files import chat_template
from hypothesis import given
from hypothesis import strategies as st
from text_support import CHAT_TEMPLATE, byte_text
from tool_models import TEMPLATES
from tool_templates import BARE, BROKEN, LISTED, MARKED, SPECIAL, TAGGED, TEXTUAL

from quickchange_server.frontend.parsing.reasoning_parser import ReasoningFormat, ReasoningReader
from quickchange_server.frontend.templates.chat_template import Rendering
from quickchange_server.frontend.tokenizer import Text

TAGS = ReasoningFormat("<think>", "</think>")
FORMS = {
    "thinks_in_field": ReasoningFormat("<think>", "</think>", taken="field"),
    "thinks_always": ReasoningFormat("<think>", "</think>", taken="field"),
    "thinks_with_empty_thoughts": ReasoningFormat("<think>", "</think>", taken="field"),
    "thinks_taken_out": TAGS,
    "thinks_switched": TAGS,
    "thinks_in_parts": ReasoningFormat("[THINK]", "[/THINK]", taken="part"),
    "thinks_in_channels": ReasoningFormat(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        again="<|start|>assistant",
        plain="<|channel|>final<|message|>",
        taken="field",
    ),
    "thinks_before_calls": ReasoningFormat(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        plain="<|START_RESPONSE|>",
        last="<|END_RESPONSE|>",
        taken="field",
    ),
    "thinks_in_phrases": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "thinks_in_told_tags": ReasoningFormat(
        "<think>", "</think>", plain="<response>", last="</response>"
    ),
    "thinks_with_special_tokens": ReasoningFormat(
        "<|im_start|>think", "<|im_start|>done", taken="field"
    ),
}
ASK = [{"role": "user", "content": "probe"}]


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_the_templates_own(name: str) -> None:
    assert byte_text(chat_template(name)).reasoning_format == FORMS[name]


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, MARKED, BARE, LISTED, TAGGED, TEXTUAL, SPECIAL, BROKEN, None],
    ids=["plain", "marked", "bare", "listed", "tagged", "textual", "special", "broken", "none"],
)
def test_a_template_that_marks_no_thoughts_has_no_form(template: str | None) -> None:
    assert byte_text(template).reasoning_format is None


@pytest.mark.parametrize(
    ("name", "variables", "opened", "closed"),
    [
        ("thinks_in_field", {}, False, False),
        ("thinks_in_field", {"enable_thinking": False}, False, True),
        ("thinks_always", {}, True, False),
        ("thinks_taken_out", {}, True, False),
        ("thinks_switched", {}, False, True),
        ("thinks_switched", {"thinking": True}, True, False),
        ("thinks_in_channels", {}, False, False),
    ],
)
def test_the_prompts_end_tells_whether_a_thought_has_begun(
    name: str, variables: dict[str, bool], opened: bool, closed: bool
) -> None:
    text = byte_text(chat_template(name))
    prompt = text.render_chat(ASK, how=Rendering(variables=variables))
    form = text.reasoning_format
    assert form is not None
    assert (form.opened(prompt), form.closed(prompt)) == (opened, closed)


def read(
    form: ReasoningFormat, pieces: list[str], *, opened: bool = False, closed: bool = False
) -> tuple[str, str, str]:
    """The thought, the content, and the characters told to be thoughts."""
    reader = ReasoningReader(form, opened=opened, closed=closed)
    told = [reader.push(one, final=False) for one in pieces] + [reader.push("", final=True)]
    text = "".join(pieces)
    within = "".join(text[start:stop] for start, stop in reader.spans)
    return "".join(t for t, _ in told), "".join(c for _, c in told), within


CHANNELS = FORMS["thinks_in_channels"]
MARKS = FORMS["thinks_before_calls"]
PHRASES = FORMS["thinks_in_phrases"]
SAID = [
    (TAGS, {}, "<think>\nHm, 2.\n</think>\n\nTwo.", "Hm, 2.", "Two."),
    (TAGS, {}, "Two, <think>not</think>.", "", "Two, <think>not</think>."),
    (TAGS, {}, "<think></think>Two.", "", "Two."),
    (TAGS, {}, "<think>cut o", "cut o", ""),
    (TAGS, {}, "<thin", "", "<thin"),
    (TAGS, {}, "  Two. ", "", "  Two. "),
    (TAGS, {"opened": True}, "Hm, 2.\n</think>\nTwo.", "Hm, 2.", "Two."),
    (TAGS, {"opened": True}, "Hm < 2 </thin", "Hm < 2 </thin", ""),
    (TAGS, {"closed": True}, "Two </think> 2", "", "Two </think> 2"),
    (
        CHANNELS,
        {},
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Two.",
        "Hm.",
        "Two.",
    ),
    (
        CHANNELS,
        {},
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B"
        "<|end|><|start|>assistant<|channel|>final<|message|>Two.",
        "AB",
        "Two.",
    ),
    (CHANNELS, {}, "<|channel|>final<|message|>Two.", "", "Two."),
    (
        MARKS,
        {},
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Two.<|END_RESPONSE|>",
        "Hm.",
        "Two.",
    ),
    (MARKS, {"closed": True}, "<|START_RESPONSE|>Two.<|END_RESPONSE|>", "", "Two."),
    (
        PHRASES,
        {},
        "Here is my thought process:\n\nHm.\n\nHere is my response:\n\nTwo.",
        "Hm.",
        "Two.",
    ),
]


@pytest.mark.parametrize("said", SAID, ids=range(len(SAID)))
def test_thought_and_answer_are_told_apart(
    said: tuple[ReasoningFormat, dict[str, bool], str, str, str],
) -> None:
    form, prompt, text, thought, answer = said
    found, content, within = read(form, [text], **prompt)
    assert (found, content) == (thought, answer)
    assert within.replace("\n", "") == thought


@given(st.sampled_from(SAID), st.lists(st.integers(0, 90), max_size=6), st.text(max_size=8))
def test_the_result_does_not_depend_on_the_pieces(
    said: tuple[ReasoningFormat, dict[str, bool], str, str, str], cuts: list[int], more: str
) -> None:
    form, prompt, text, _, _ = said
    text += more
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(form, pieces, **prompt) == read(form, [text], **prompt)


def test_a_thought_is_told_as_it_comes() -> None:
    reader = ReasoningReader(TAGS, opened=False)
    told = [reader.push(piece, final=False) for piece in ("<think>", "Let ", "me see", "</th")]
    assert [thought for thought, _ in told] == ["", "Let", " me see", ""]


THINK = ("<think>", "</think>", "", "")
PUBLIC = {  # models' own templates: begin, end, again, plain
    "deepseek_r1_distill": THINK,
    "deepseek_v3.2": THINK,
    "gemma4": ("<|channel>thought", "<channel|>", "", ""),
    "glm4.6": THINK,
    "glm4.7": THINK,
    "gpt_oss": (
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant",
        "<|channel|>final<|message|>",
    ),
    "granite3.3": ("<think>", "</think>", "", "<response>"),
    "lfm2.5": THINK,
    "minimax_m2": THINK,
    "qwen3": THINK,
    "qwen3.5": THINK,
    "seed_oss": ("<seed:think>", "</seed:think>", "", ""),
    "solar_open": ("<|think|>", "<|end|>", "<|begin|>assistant", "<|content|>"),
    "vllm_deepseekr1": THINK,
    "vllm_deepseekv31": THINK,
}


def public(name: str) -> Text:
    return byte_text((TEMPLATES / f"{name}.jinja").read_text())


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_the_forms_of_models_own_templates(name: str) -> None:
    form = public(name).reasoning_format
    found = None if form is None else (form.begin, form.end, form.again, form.plain)
    assert found == PUBLIC.get(name)


WRITERS = (
    "glm4.6",
    "gpt_oss",
    "lfm2.5",
    "minimax_m2",
    "qwen3",
    "qwen3.5",
    "seed_oss",
    "solar_open",
)
WRITTEN = [(name, thought) for name in WRITERS for thought in ("Hm, 2.", "")]
WRITTEN.remove(("minimax_m2", ""))  # its prompt begins a thought that this message lacks


@pytest.mark.parametrize(("name", "thought"), WRITTEN)
def test_what_a_models_own_template_writes_is_read_back(name: str, thought: str) -> None:
    text = public(name)
    form = text.reasoning_format
    assert form is not None
    prompt = text.render_chat(ASK)
    answer = {"role": "assistant", "content": "Two.", "reasoning": thought}
    whole = text.render_chat([*ASK, answer], how=Rendering(add_generation_prompt=False))
    assert whole.startswith(prompt)
    said = whole.removeprefix(prompt)
    said = said[: said.index("Two.") + len("Two.")]
    found = read(form, [said], opened=form.opened(prompt), closed=form.closed(prompt))
    assert found[:2] == (thought, "Two.")


@pytest.mark.parametrize("name", ["thinks_in_field", "thinks_in_parts", "thinks_in_channels"])
def test_an_earlier_thought_is_handed_to_a_template_that_reads_it(name: str) -> None:
    text = byte_text(chat_template(name))
    answer = {"role": "assistant", "content": "Two.", "reasoning": "Hm, 2."}
    rendered = text.render_chat([*ASK, answer], how=Rendering(add_generation_prompt=False))
    assert rendered.index("Hm, 2.") < rendered.index("Two.")
