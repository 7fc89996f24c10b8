"""The fields that constrain text: what reaches the engine, and what is refused where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from text_support import byte_text

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}}
OPENAI = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("structured") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    with live_server(journal.parent / "store", Behaviour(journal=journal), byte_text()) as live:
        yield live


def ask(live: Live, chat: bool, fields: dict[str, Any]) -> Any:
    if chat:
        body = {"messages": [{"role": "user", "content": "x"}]}
        return live.post("/v1/chat/completions", {"model": BASE, "max_tokens": 2, **body, **fields})
    return live.post("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 2, **fields})


def sent(live: Live, journal: Path, fields: dict[str, Any], *, chat: bool = True) -> Any:
    """The constraint that reached the engine: [kind, source] or None."""
    response = ask(live, chat, fields)
    assert response.status_code == 200, response.text
    return entries(journal, "Submit")[-1]["constraint"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": OPENAI}, "json_schema", '"minimum":0'),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_object", ""),
        ({"guided_json": SCHEMA}, "json_schema", '"minimum":0'),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", '"minimum":0'),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+"),
        ({"guided_choice": ["yes", 'n"o']}, "grammar", "start: "),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", '"minimum":0'),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "grammar", "start: "),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
)
def test_every_form_becomes_a_constraint(
    live: Live, journal: Path, chat: bool, fields: dict[str, Any], kind: str, source: str
) -> None:
    found_kind, found_source = sent(live, journal, fields, chat=chat)
    assert found_kind == kind
    assert source in found_source


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_without_such_a_field_any_text_will_do(
    live: Live, journal: Path, fields: dict[str, Any]
) -> None:
    assert sent(live, journal, fields) is None


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


IN_SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            of_schema({"properties": {"age": {"minimum": "0"}}}),
            f"{IN_SCHEMA}.properties.age.minimum",
        ),
        (of_schema({"uniqueItems": True}), f"{IN_SCHEMA}.uniqueItems"),
        (of_schema({"type": "string", "pattern": "("}), f"{IN_SCHEMA}.pattern"),
        (of_schema(5), IN_SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"scheme": {"a": 1}}}},
         "response_format.json_schema.scheme"),
        ({"response_format": {}}, "response_format.type"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"items": {"type": 5}}}, "guided_json.items.type"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_grammar": "start: foo"}, "guided_grammar"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json.not"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", **of_schema({})}, "guided_regex"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ],
)  # fmt: skip
def test_a_bad_constraint_is_refused_at_its_place(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    response = ask(live, True, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert error["type"] == "invalid_request_error"


def test_requests_are_counted_by_kind(live: Live) -> None:
    assert ask(live, True, {"guided_regex": "ab?"}).status_code == 200
    assert 'quickchange_structured_requests_total{kind="regex"}' in live.http.get("/metrics").text
