"""Grammars of calls in the forms of public chat templates: what they accept is read back lawful."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
from text_support import END, byte_text
from tool_models import TOOLS, form_of, model_text, parsed, read, turn
from tool_templates import TAGGED

from quickchange_server.api.openai.chat.tool_grammars import call_grammar, free_grammar
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.parsing.tool_forms import NamedCall
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import LibraryMatcher, TokenGrammars

# One of each kind of form.
NAMES = ("qwen3_coder", "glm4.6", "minimax_m2", "seed_oss", "deepseek_v3.2", "lfm2.5", "apertus",
         "vllm_llama3.2_pythonic", "vllm_deepseekv3", "vllm_deepseekv31", "mistral_small3.2",
         "devstral", "kimi_k2", "functionary3.1", "solar_open", "gpt_oss", "minimax_m1", "qwen3",
         "llama3.1", "mistral_nemo", "vllm_xlam_qwen", "vllm_granite")  # fmt: skip
MARKS = {  # that are special tokens in a real model's vocabulary
    "glm4.6": ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
               "</arg_value>"),
    "devstral": ("[TOOL_CALLS]", "[ARGS]"),
    "vllm_deepseekv31": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
                         "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
}  # fmt: skip


def tool(name: str, parameters: dict[str, Any], **more: Any) -> Tool:
    function = {"name": name, "parameters": parameters, **more}
    return Tool.model_validate({"type": "function", "function": function})


def offered(*, strict: bool = False) -> list[Tool]:
    return [tool(name, schema, strict=strict) for name, schema in TOOLS.items()]


@cache
def grammars(text: Text) -> TokenGrammars:
    return TokenGrammars.of(text)


def matcher_of(text: Text, source: str) -> LibraryMatcher:
    return grammars(text).compile(Constraint("grammar", source))


def accepts(text: Text, source: str, written: str) -> bool:
    tokens = [*text.encode_now(written, add_special_tokens=False), END]
    return matcher_of(text, source).allowed(tokens) == len(tokens)


def calls(name: str, *wanted: tuple[str, dict[str, Any]]) -> str:
    """The calls as a grammar has them: without a template's padding, Python's strings as JSON's."""
    form = form_of(name)
    if isinstance(form.call, NamedCall) and form.call.arguments == "python":
        written = (
            f"{function}({', '.join(f'{key}={json.dumps(value)}' for key, value in given.items())})"
            for function, given in wanted
        )
        return form.begin + form.separator.join(written) + form.end
    return re.sub(r' {3,}|, "id": "call\d+"', "", turn(name, wanted))


def call(name: str, arguments: dict[str, Any], function: str = "weather") -> str:
    return calls(name, (function, arguments))


@pytest.mark.parametrize(("name", "special"), [*((name, ()) for name in NAMES), *MARKS.items()])
def test_a_demanded_call_is_one_that_fits_its_schema(name: str, special: tuple[str, ...]) -> None:
    text = model_text(name, special)
    assert text.tool_form is not None
    source = call_grammar(text, text.tool_form, offered())
    assert accepts(text, source, call(name, {"city": "Porto", "days": 3}))
    assert accepts(text, source, call(name, {"zone": "WET"}, "time"))
    assert not accepts(text, source, call(name, {"days": 3}))
    assert not accepts(text, source, call(name, {"city": "Porto", "days": "three"}))
    assert not accepts(text, source, call(name, {"city": "Porto", "wind": "x"}))
    assert not accepts(text, source, "It rains.")
    assert not accepts(text, source, call(name, {"city": "Porto"}, "other"))


@pytest.mark.parametrize("name", NAMES)
def test_strict_holds_from_where_a_call_opens(name: str) -> None:
    text, form = model_text(name), form_of(name)
    source = free_grammar(text, form, offered(strict=True), parallel=True)
    said = "So: " if form.mark else ""
    lawful = call(name, {"city": "Porto", "days": 3})
    assert accepts(text, source, said + lawful)
    assert accepts(text, source, "It rains.")
    assert not accepts(text, source, said + call(name, {"city": "Porto", "days": "three"}))
    assert not accepts(text, source, said + call(name, {"days": 3}))
    if form.several:
        two = calls(name, ("weather", {"city": "Porto"}), ("time", {"zone": "WET"}))
        assert accepts(text, source, two)
        alone = free_grammar(text, form, offered(strict=True), parallel=False)
        assert not accepts(text, alone, two)


@pytest.mark.parametrize("name", NAMES)
def test_without_strict_any_arguments_are_lawful(name: str) -> None:
    text, form = model_text(name), form_of(name)
    tools = [tool("weather", TOOLS["weather"]), tool("time", TOOLS["time"], strict=True)]
    source = free_grammar(text, form, tools, parallel=True)
    assert accepts(text, source, call(name, {"city": "Porto", "wind": "x"}))


def sampled(text: Text, source: str, draw: random.Random, most: int) -> str | None:
    """A text that a random model writes under a grammar; None if it is too long."""
    matcher = matcher_of(text, source)
    written: list[int] = []
    for _ in range(most):
        likely = [*b'"}]>\n<)0123 aeiou', END]
        draw.shuffle(likely)
        rest = list(range(text.vocab_size))
        draw.shuffle(rest)
        token = next(t for t in [*likely[:6], *rest] if matcher.copy().allowed([t]) == 1)
        if token in text.eos_ids:
            return text.decode(written)
        matcher.advance(token)
        written.append(token)
        if matcher.complete:
            return text.decode(written)
    return None


FULL = {
    "type": "object",
    "properties": {
        "mode": {"enum": ["fast", "slow"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "code": {"type": "string", "minLength": 1, "maxLength": 4},
        "tag": {"type": "string", "pattern": "^[ab]{1,3}$"},
        "flag": {"type": "boolean"},
        "unit": {"$ref": "#/$defs/unit"},
        "either": {"type": ["integer", "null"]},
        "note": {"type": ["string", "null"]},
        "list": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    },
    "required": ["mode", "tag", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"anyOf": [{"const": "m"}, {"const": "km"}]}},
}


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_random_model_writes_is_read_back_and_fits(name: str) -> None:
    text, form = model_text(name), form_of(name)
    source = call_grammar(text, form, [tool("f", FULL)])
    read_back = 0
    for seed in range(4):
        written = sampled(text, source, random.Random(seed), most=900)
        if written is None:
            continue
        said, told = read(form, [written], {"f": FULL})
        assert said.strip() == "", written
        ((called, arguments),) = parsed(told)
        assert called == "f"
        jsonschema.Draft202012Validator(FULL).validate(arguments)
        read_back += 1
    assert read_back


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "a.format"),
        ({"properties": {"a": {"allOf": [{"type": "string"}]}}}, "a.allOf"),
        ({"properties": {"a b": {"type": "string"}}}, "a b"),
        ({"minProperties": 1}, "minProperties"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "a.pattern"),
    ],
)
def test_what_a_form_cannot_keep_is_refused_by_its_place(
    parameters: dict[str, Any], place: str
) -> None:
    text, form = model_text("qwen3_coder"), form_of("qwen3_coder")
    with pytest.raises(InvalidRequestError, match=place) as refused:
        call_grammar(text, form, [tool("f", {"type": "object", **parameters})])
    assert refused.value.param == "tools"
    json_form = form_of("qwen3")
    call_grammar(model_text("qwen3"), json_form, [tool("f", {"type": "object", **parameters})])


def test_a_value_never_holds_what_closes_it() -> None:
    text = byte_text(TAGGED)
    assert text.tool_form is not None
    source = call_grammar(text, text.tool_form, [tool("time", TOOLS["time"])])
    assert accepts(text, source, "<call name=time><zone>a < b </zon</zone></call>")
    assert not accepts(text, source, "<call name=time><zone>a</zone>b</zone></call>")
    _, told = read(text.tool_form, ["<call name=time><zone>a < b </zon</zone></call>"])
    assert json.loads(told[0][1]) == {"zone": "a < b </zon"}
