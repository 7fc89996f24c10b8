"""Requests under adapters with virtual tokens: what fits the context, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from http_support import BASE, Live, expected_text, live_server

from quickchange_server.protocol import Component
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.prompt_part import VirtualPrompt
from quickchange_store.store import Store

VIRTUAL, CONTEXT = 7, 64


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("virtual")
    prompt = VirtualPrompt("embeddings", torch.ones(VIRTUAL, 4))
    Store(folder).add("front", CanonicalAdapter("LlamaForCausalLM", BASE, {}, prompt=prompt))
    with live_server(folder, max_model_len=CONTEXT) as live:
        yield live


def ask(live: Live, route: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "front", "prompt": "Hello", "seed": 3, **fields}
    answer: dict[str, Any] = live.post(route, body).json()
    return answer


def test_virtual_tokens_are_not_counted_as_the_prompts(live: Live) -> None:
    body = ask(live, max_tokens=4)
    component = Component(live.store.resolve("front").digest, virtual_tokens=VIRTUAL)
    assert body["choices"][0]["text"] == expected_text(3, 5, 4, component)
    assert body["usage"]["prompt_tokens"] == 5


def test_what_does_not_fit_beside_them_is_refused_with_their_number(live: Live) -> None:
    room = CONTEXT - VIRTUAL - 5
    assert ask(live, max_tokens=room)["usage"]["completion_tokens"] == room
    error = ask(live, max_tokens=room + 1)["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"the adapter's virtual tokens take {VIRTUAL}" in error["message"]
    assert f"lower max_tokens to {room}" in error["message"]
    long = ask(live, prompt="x" * (CONTEXT - VIRTUAL))["error"]
    assert f"virtual tokens take {VIRTUAL}" in long["message"]
    assert "choices" in ask(live, model=BASE, prompt="x" * (CONTEXT - VIRTUAL), max_tokens=1)


def test_an_answer_without_a_limit_ends_where_the_context_does(live: Live) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "prompt": None}
    body = live.post("/v1/chat/completions", {"model": "front", **chat, "seed": 1}).json()
    assert body["usage"]["total_tokens"] == CONTEXT - VIRTUAL


def test_a_prompt_is_cut_to_what_they_leave(live: Live) -> None:
    body = ask(live, prompt="x" * 200, truncate_prompt_tokens=-1, max_tokens=1)
    assert body["usage"]["prompt_tokens"] <= CONTEXT - VIRTUAL - 1
    vectors = {"model": "front", "input": "x" * 200, "truncate_prompt_tokens": -1}
    found = live.post("/v1/embeddings", vectors).json()
    assert found["usage"]["prompt_tokens"] == CONTEXT - VIRTUAL


def test_rendering_tells_what_they_leave(live: Live) -> None:
    chat = {"model": "front", "messages": [{"role": "user", "content": "Hi"}]}
    rendered = live.post("/v1/chat/completions/render", chat).json()
    told = len(rendered["token_ids"]) + rendered["sampling_params"]["max_tokens"]
    assert told == CONTEXT - VIRTUAL


def test_the_adapters_document_tells_form_and_number(live: Live) -> None:
    info = live.http.get("/v1/adapters/front").json()["info"]
    assert info["prompt"] == {"form": "embeddings", "tokens": VIRTUAL}
    assert info["kind"] == "prompt tuning"


def test_another_weight_than_1_is_refused(live: Live) -> None:
    adapters = [{"id": "front", "weight": 0.5}]
    error = ask(live, model=BASE, adapters=adapters)["error"]
    assert error["param"] == "adapters"
    assert "give 1" in error["message"]
