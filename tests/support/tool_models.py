"""Tokenizers with the chat templates of public models, and what is asked of their tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from text_support import byte_tokenizer
from tokenizers import AddedToken

from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.parsing.argument_reading import CallPiece
from quickchange_server.frontend.parsing.tool_forms import ToolForm
from quickchange_server.frontend.parsing.tool_parser import ToolReader
from quickchange_server.frontend.templates.chat_template import Rendering
from quickchange_server.frontend.tokenizer import Text

TEMPLATES = Path(__file__).parent / "public_templates"
REFUSED = ("deepseek_r1_distill", "granite3.3", "gemma4")  # take no tools, or can't be read back
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if path.stem not in REFUSED)
ONE_CALL = frozenset({"llama3.1", "llama3.2", "gpt_oss"})  # of a message, at most
ENDS = (
    *("</s>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>", "<|call|>"),
    *("<｜end▁of▁sentence｜>", "<end_of_sentence>", "[e~[", "<seed:eos>", "<end_of_turn>"),
)

_FLAG = {"type": "boolean"}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": _FLAG,
        "where": {"type": "object", "properties": {"lat": {"type": "number"}, "sea": _FLAG}},
        "kinds": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TIME: dict[str, Any] = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOLS: dict[str, Any] = {"weather": WEATHER, "time": TIME}

Call = tuple[str, dict[str, Any]]


@cache
def model_text(name: str, special: tuple[str, ...] = ()) -> Text:
    """A byte tokenizer with a public model's template; the marks in `special` are tokens of it."""
    tokenizer = byte_tokenizer()
    added = [AddedToken(mark, special=True) for mark in dict.fromkeys([*ENDS, *special])]
    tokenizer.backend_tokenizer.add_special_tokens(added)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    ids = {257, *(tokenizer.convert_tokens_to_ids(mark) for mark in ENDS)}
    return Text(model_tokenizer(tokenizer), vocab_size=len(tokenizer), eos_ids=frozenset(ids))


def form_of(name: str, special: tuple[str, ...] = ()) -> ToolForm:
    form = model_text(name, special).tool_form
    assert form is not None
    return form


def tools_for_template() -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {"name": name, "description": name, "parameters": schema},
        }
        for name, schema in TOOLS.items()
    ]


def history(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """A question, calls and their results."""
    written = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": n, "arguments": arguments}}
        for i, (n, arguments) in enumerate(calls)
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"],  # type: ignore[index]
         "content": "12 mm"}
        for call in written
    ]  # fmt: skip
    asked = {"role": "user", "content": "Rain in Porto?"}
    return [asked, {"role": "assistant", "content": "", "tool_calls": written}, *results]


def turn(name: str, calls: Iterable[Call]) -> str:
    """What the model would have written to make these calls, as its template has it."""
    text = model_text(name)
    messages = history(calls)[:2]
    tools = tools_for_template()
    asked = text.render_chat(messages[:1], tools=tools)
    called = text.render_chat(messages, tools=tools, how=Rendering(add_generation_prompt=False))
    mark = form_of(name).mark or form_of(name).head
    start = called.rindex("Rain in Porto?") if mark else _shared(asked, called)
    turned = called[called.index(mark, start) :] if mark else called[start:]
    ends = [turned.index(end) for end in (*ENDS, "<|im_end|>") if end in turned]
    return turned[: min(ends, default=len(turned))]


def _shared(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def read(
    form: ToolForm, pieces: Iterable[str], tools: Mapping[str, Any] = TOOLS
) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls (name, arguments as text) in a text that comes in pieces."""
    reader = ToolReader(form, tools)
    said, told = "", list[CallPiece]()
    for piece in (*pieces, None):
        text, grown = reader.push(piece or "", final=piece is None)
        said += text
        told += grown
    calls: list[tuple[str, str]] = []
    for grown_by in told:
        if grown_by.name is not None:
            assert grown_by.index == len(calls)
            calls.append((grown_by.name, ""))
        name, arguments = calls[grown_by.index]
        calls[grown_by.index] = (name, arguments + grown_by.arguments)
    return said, calls


def parsed(calls: Iterable[tuple[str, str]]) -> list[Call]:
    return [(name, json.loads(arguments)) for name, arguments in calls]
