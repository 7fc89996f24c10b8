"""LoRAX's route for vectors, and TGI's for a chat's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_engine import embedding_of
from http_support import BASE, Live, live_server, make_adapter
from text_support import byte_text

from quickchange_server.protocol import Component
from quickchange_store.combining.merging import Recipe, derive
from quickchange_store.store import Store

CHAT = [{"role": "user", "content": "Grüße"}]
TWO: dict[str, Any] = {"ids": ["team/sql", "json"], "weights": [0.5, 2.0]}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("texts")
    store = Store(folder)
    store.add("team/sql", make_adapter(1.0))
    store.add("json", make_adapter(2.0))
    with live_server(folder, text=byte_text()) as live:
        yield live


def vector(live: Live, **parameters: Any) -> list[float]:
    answer = live.post("/embed", {"inputs": "Hello", "parameters": parameters})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"embeddings"}
    embeddings: list[float] = body["embeddings"]
    return embeddings


def openais(live: Live, **fields: Any) -> list[float]:
    body = {"model": BASE, "input": "Hello", **fields}
    data: list[float] = live.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    return data


@pytest.mark.parametrize(
    ("parameters", "same"),
    [
        ({}, {}),
        ({"adapter_id": "__base_model__", "adapter_source": "local"}, {}),
        ({"adapter_id": "team/sql", "api_token": "secret"}, {"model": "team/sql"}),
        (
            {"merged_adapters": TWO},
            {"adapters": [{"id": "team/sql", "weight": 0.5}, {"id": "json", "weight": 2.0}]},
        ),
    ],
)
def test_a_text_is_the_vector_that_openais_route_gives(
    live: Live, parameters: dict[str, Any], same: dict[str, Any]
) -> None:
    told = vector(live, **parameters)
    assert told == openais(live, **same)
    assert np.linalg.norm(told) == pytest.approx(1)


def test_an_adapter_has_another_vector_than_the_base(live: Live) -> None:
    assert vector(live, adapter_id="team/sql") != vector(live)


def test_a_merge_by_ties_is_made_for_a_vector_too(live: Live) -> None:
    merge = {**TWO, "merge_strategy": "ties", "density": 0.5}
    told = vector(live, merged_adapters=merge)
    terms = zip(map(live.store.resolve, TWO["ids"]), TWO["weights"], strict=True)
    named = tuple(sorted((version.digest, weight) for version, weight in terms))
    merged = Component(derive(live.store, Recipe("ties", named, 0.5)))
    right = np.array(embedding_of(tuple(b"Hello"), "last", (merged,)))
    np.testing.assert_allclose(told, right / np.linalg.norm(right), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"inputs": ""}, 422, "`inputs` cannot be empty"),
        ({}, 422, "inputs: is required"),
        ({"inputs": ["Hello"]}, 422, "inputs"),
        ({"inputs": "x" * 3000}, 422, "inputs has 3000"),
        ({"inputs": "x", "parameters": {"adapter_id": "owner/x"}}, 424, "nothing is fetched"),
        ({"inputs": "x", "parameters": {"top_k": 3}}, 422, "top_k: unknown field"),
        (
            {"inputs": "x", "parameters": {"adapter_id": "json", "merged_adapters": TWO}},
            422,
            "at most one of",
        ),
    ],
)
def test_what_can_not_be_a_vector_is_refused_in_loraxs_form(
    live: Live, body: dict[str, Any], status: int, said: str
) -> None:
    answer = live.post("/embed", body)
    assert (answer.status_code, set(answer.json())) == (status, {"error", "error_type"})
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    "more", [{}, {"continue_final_message": True}, {"add_special_tokens": True}, {"model": "tgi"}]
)
def test_a_chats_tokens_are_those_of_its_prompt(live: Live, more: dict[str, Any]) -> None:
    body = {"messages": CHAT, **more}
    told = live.post("/chat_tokenize", body).json()
    plain = live.post("/tokenize", {k: v for k, v in body.items() if k != "model"}).json()
    tokens, text = told["tokenize_response"], told["templated_text"]
    assert [token["id"] for token in tokens] == plain["tokens"]
    assert "Grüße" in text
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in tokens)


def test_a_chat_that_is_none_is_refused_in_tgis_form(live: Live) -> None:
    answer = live.post("/chat_tokenize", {"messages": []})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    unknown = live.post("/chat_tokenize", {"messages": CHAT, "model": "nobody"})
    assert unknown.status_code == 424
