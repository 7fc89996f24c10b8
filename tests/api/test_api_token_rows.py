"""A token that the model has no row for is a 400 on every surface, whatever form it came in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_support import BASE, Live, live_server
from text_support import CHAT_TEMPLATE, END, byte_tokenizer

from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text

IMAGE = "<image>"  # id 258 of a model with rows 0 to 257


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = Text(model_tokenizer(tokenizer), vocab_size=258, eos_ids=frozenset({END, 258}))
    with live_server(tmp_path_factory.mktemp("store"), text=text) as running:
        yield running


MESSAGES = [{"role": "user", "content": f"Look: {IMAGE}"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": f"Look: {IMAGE}"}, "prompt"),
        ("/v1/completions", {"prompt": ["Hi", f"Look: {IMAGE}"]}, "prompt"),
        ("/v1/completions", {"prompt": [1, 258]}, "prompt"),
        ("/v1/completions", {"prompt": [[1, 2], [258]]}, "prompt"),
        ("/v1/chat/completions", {"messages": MESSAGES}, "messages"),
        ("/v1/embeddings", {"input": f"Look: {IMAGE}"}, "input"),
        ("/v1/embeddings", {"input": [[258]]}, "input"),
        ("/v1/completions", {"prompt": "Hi", "stop_token_ids": [258]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "Hi", "logit_bias": {"258": 1}}, "logit_bias"),
    ],
)
def test_it_names_the_field_and_the_token(
    live: Live, path: str, body: dict[str, Any], param: str
) -> None:
    answer = live.post(path, {"model": BASE, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "258 ('<image>')" in error["message"]
    assert "0 to 257" in error["message"]


def test_it_is_named_on_lorax_surface(live: Live) -> None:
    answer = live.post("/generate", {"inputs": f"Look: {IMAGE}"})
    assert answer.status_code in (400, 422)
    assert "258 ('<image>')" in answer.text


def test_other_text_is_served(live: Live) -> None:
    body = {"model": BASE, "prompt": "Look: an image", "max_tokens": 3}
    assert live.post("/v1/completions", body).status_code == 200
