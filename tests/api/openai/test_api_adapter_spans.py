"""Adapters over spans of a text, and activated ones, over HTTP: what reaches the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from http_support import BASE, Live, expected_text, live_server, make_adapter

from quickchange_server.protocol import Component
from quickchange_store.canonical.stored_parts import Invocation
from quickchange_store.combining.merging import Recipe, derive
from quickchange_store.store import Store

PROMPT = "Hello"
CALL = tuple(b"lo")  # tokens are bytes


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("spans")
    store = Store(folder)
    store.add("sql", make_adapter(1.0))
    for number, name in enumerate(("judge", "writer")):
        store.add(name, replace(make_adapter(2.0 + number), invocation=Invocation(CALL)))
    with live_server(folder) as live:
        yield live


def digest(live: Live, name: str) -> str:
    return live.store.resolve(name).digest


def text_of(live: Live, **fields: Any) -> str:
    body = {"model": BASE, "prompt": PROMPT, "seed": 3, "max_tokens": 6, **fields}
    response = live.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_a_schedule_by_position_reaches_the_engine_in_one_form(live: Live) -> None:
    key = digest(live, "sql")
    expected = expected_text(3, 5, 6, Component(key, 1.0, 0, 7), Component(key, 0.25, 7))
    terms = [{"id": "sql", "weight": 0.25, "begin": 7}, {"id": "sql", "end": 7}]
    assert text_of(live, adapters=terms) == expected
    overlapping = [{"id": "sql", "weight": 0.25}, {"id": "sql@1", "weight": 0.75, "end": 7}]
    assert text_of(live, adapters=overlapping) == expected
    empty = [{"id": "sql", "begin": 4}, {"id": "sql", "weight": -1, "begin": 4}]
    assert text_of(live, adapters=empty) == expected_text(3, 5, 6)


@pytest.mark.parametrize(
    ("term", "param"),
    [
        ({"begin": -1}, "adapters[0].begin"),
        ({"begin": 1.5}, "adapters[0].begin"),
        ({"begin": 2**40}, "adapters[0].begin"),
        ({"end": 0}, "adapters[0].end"),
        ({"begin": 7, "end": 7}, "adapters[0]"),
        ({"begin": 8, "end": 7}, "adapters[0]"),
    ],
)
def test_a_span_that_holds_no_position_is_refused_by_its_place(
    live: Live, term: dict[str, Any], param: str
) -> None:
    body = {"model": BASE, "prompt": PROMPT, "adapters": [{"id": "sql", **term}]}
    response = live.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_an_activated_adapter_begins_where_its_invocation_stands_last(live: Live) -> None:
    key = digest(live, "judge")
    body = {"model": "judge", "prompt": "lo, Hello!", "seed": 3, "max_tokens": 6}
    response = live.post("/v1/completions", body)
    assert response.json()["choices"][0]["text"] == expected_text(3, 10, 6, Component(key, 1.0, 7))
    assert response.headers["x-quickchange-adapter"] == key


def test_a_prompt_without_the_invocation_is_the_bases(live: Live) -> None:
    body = {"model": "judge", "prompt": "Hi", "seed": 3, "max_tokens": 6}
    response = live.post("/v1/completions", body)
    assert response.json()["choices"][0]["text"] == expected_text(3, 2, 6)
    assert "x-quickchange-adapter" not in response.headers


def test_each_prompt_of_a_request_has_its_own_place(live: Live) -> None:
    key = digest(live, "judge")
    body = {"model": "judge", "prompt": ["Hello", "lo", "Hi"], "seed": 3, "max_tokens": 6}
    choices = live.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == [
        expected_text(3, 5, 6, Component(key, 1.0, 3)),
        expected_text(3, 2, 6, Component(key)),
        expected_text(3, 2, 6),
    ]


def test_a_chat_activates_by_what_its_template_writes(live: Live) -> None:
    chat = [{"role": "user", "content": "Hallo"}]
    tokens = live.post("/tokenize", {"messages": chat}).json()["tokens"]
    place = max(i for i in range(len(tokens)) if tuple(tokens[i : i + 2]) == CALL)
    body = {"model": "judge", "messages": chat, "seed": 3, "max_tokens": 6}
    said = live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    component = Component(digest(live, "judge"), 1.0, place)
    assert said == expected_text(3, len(tokens), 6, component)


def test_in_a_composition_an_activated_adapter_begins_at_its_own_invocation(live: Live) -> None:
    terms = [{"id": "sql", "weight": 0.5}, {"id": "judge", "begin": 1, "end": 9}]
    expected = [Component(digest(live, "sql"), 0.5), Component(digest(live, "judge"), 1.0, 3, 9)]
    expected.sort(key=lambda component: component.digest)
    assert text_of(live, adapters=terms) == expected_text(3, 5, 6, *expected)


def test_vectors_are_read_under_the_span(live: Live) -> None:
    body = {"model": "judge", "input": ["Hello", "Hi"], "encoding_format": "float"}
    plain = {**body, "model": BASE}
    own, base = (live.post("/v1/embeddings", b).json()["data"] for b in (body, plain))
    assert own[0]["embedding"] != base[0]["embedding"]
    assert own[1]["embedding"] == base[1]["embedding"]


@pytest.mark.parametrize(("ids", "status"), [(["judge", "writer"], 200), (["judge", "sql"], 422)])
def test_merges_are_activated_by_the_invocation_that_all_have(
    live: Live, ids: list[str], status: int
) -> None:
    merged = {"ids": ids, "weights": [1, 1], "merge_strategy": "ties", "density": 0.5}
    parameters = {"seed": 3, "max_new_tokens": 6, "merged_adapters": merged}
    response = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert response.status_code == status, response.text
    if status == 200:
        named = tuple((digest(live, name), 1.0) for name in ids)
        key = derive(live.store, Recipe("ties", named, 0.5))
        text = response.json()["generated_text"]
        assert text == expected_text(3, 5, 6, Component(key, 1.0, 3))
    else:
        assert "other tokens" in response.text


def test_lists_tell_what_is_activated_and_by_what(live: Live) -> None:
    cards = {card["id"]: card for card in live.http.get("/v1/models").json()["data"]}
    assert cards["judge"]["quickchange"]["activated"]
    assert "activated" not in cards["sql"]["quickchange"]
    info = live.http.get("/v1/adapters/judge").json()["info"]
    assert (info["kind"], info["invocation"]) == ("aLoRA", list(CALL))


def test_an_experiments_variant_may_have_spans(live: Live) -> None:
    variants = [
        {"name": "a", "adapters": [{"id": "sql", "begin": 2, "end": 4}]},
        {"name": "b", "weight": 0, "model": BASE},
    ]
    made = live.post("/v1/experiments", {"name": "spans", "variants": variants})
    assert made.status_code == 201, made.text
    component = Component(digest(live, "sql"), 1.0, 2, 4)
    assert text_of(live, model="spans", user="u") == expected_text(3, 5, 6, component)
