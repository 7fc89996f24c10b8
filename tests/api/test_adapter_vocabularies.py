"""Adapters that add tokens, over HTTP from a real engine: texts, ends and chats are their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grown_vocabulary import ADDED, OWN_TEMPLATE, grown_tokenizer, save_base, train_grown
from http_support import Live, live_server
from peft import LoraConfig
from real_engine import with_real_engine
from tiny_models import VOCABULARY, greedy
from transformers import AutoTokenizer

TOKENS = 12
NEW = list(range(VOCABULARY, VOCABULARY + len(ADDED)))
PROMPT = "call <tool>weather</tool> now"
CHAT = [{"role": "user", "content": "hi"}]


class Trained:
    """The base, two adapters with the same tokens, and one with a chat template of its own too."""

    def __init__(self, folder: Path) -> None:
        self.base = save_base("llama", folder / "base")
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        self.model = train_grown(self.base, folder / "grown", config)
        train_grown(self.base, folder / "sister", config, seed=4)
        train_grown(self.base, folder / "other", config, seed=5)
        others = AutoTokenizer.from_pretrained(folder / "other")
        others.chat_template += "!"
        others.save_pretrained(folder / "other")
        self.folder = folder
        self.tokenizer = grown_tokenizer()

    def answer(self, prompt: list[int]) -> list[int]:
        return greedy(self.model, prompt, TOKENS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("grown"))


@pytest.fixture(scope="module")
def live(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = str(trained.base)
    with live_server(
        tmp_path_factory.mktemp("store"), **with_real_engine(model, extra_vocabulary=4)
    ) as server:
        for name in ("grown", "sister", "other"):
            body = {"name": name, "path": str(trained.folder / name)}
            added = server.post("/v1/adapters", body)
            assert added.status_code == 201, added.text
        yield server


def answer(live: Live, path: str, body: dict[str, Any]) -> Any:
    response = live.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(live: Live, path: str, body: dict[str, Any]) -> str:
    response = live.post(path, body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_texts_with_added_tokens_are_read_and_written_as_they_are_trained(
    live: Live, trained: Trained
) -> None:
    ids = trained.tokenizer(PROMPT)["input_ids"]
    assert set(NEW[:2]) <= set(ids)
    expected = trained.answer(ids)
    assert set(NEW) & set(expected)
    body = {"model": "grown", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = answer(live, "/v1/completions", {**body, "skip_special_tokens": False, "logprobs": 1})
    assert whole["choices"][0]["text"] == trained.tokenizer.decode(expected)
    assert whole["usage"]["prompt_tokens"] == len(ids)
    told = whole["choices"][0]["logprobs"]["tokens"]
    assert told == [trained.tokenizer.decode([token]) for token in expected]
    streamed = live.events("/v1/completions", {**body, "skip_special_tokens": False})
    assert "".join(e["choices"][0]["text"] for e in streamed[:-1]) == whole["choices"][0]["text"]


def test_special_added_tokens_are_left_out_of_texts(live: Live, trained: Trained) -> None:
    expected = trained.answer(trained.tokenizer(PROMPT)["input_ids"])
    body = {"model": "grown", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    text = answer(live, "/v1/completions", body)["choices"][0]["text"]
    assert text == trained.tokenizer.decode(expected, skip_special_tokens=True)


def test_tokens_and_texts_are_told_by_model(live: Live) -> None:
    own = answer(
        live, "/tokenize", {"model": "grown", "prompt": "<tool>x", "return_token_strs": True}
    )
    assert own["tokens"][0] == NEW[0]
    assert own["token_strs"][0] == "<tool>"
    plain = answer(live, "/tokenize", {"model": "base", "prompt": "<tool>x"})
    assert plain["count"] == len("<tool>x")
    text = answer(live, "/detokenize", {"model": "grown", "tokens": own["tokens"]})
    assert text["prompt"] == "<tool>x"
    said = refusal(live, "/detokenize", {"model": "base", "tokens": own["tokens"]})
    assert f"token id {NEW[0]}" in said


def test_chats_have_the_template_of_their_adapter_alone(live: Live) -> None:
    body = {"messages": CHAT, "add_generation_prompt": False}
    own = answer(live, "/tokenize", {**body, "model": "grown"})
    assert own["tokens"][:1] == NEW[:1]
    assert own["count"] == len("hi") + 2
    plain = answer(live, "/tokenize", {**body, "model": "base"})
    assert plain["count"] == len("user: hi\n")
    chat = {"messages": CHAT, "max_tokens": 1}
    usage = answer(live, "/v1/chat/completions", {**chat, "model": "grown"})["usage"]
    assert usage["prompt_tokens"] == len("hi") + 2
    usage = answer(live, "/v1/chat/completions", {**chat, "model": "base"})["usage"]
    assert usage["prompt_tokens"] == len("user: hi\n")


def test_nobody_else_names_the_tokens(live: Live) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    for field in (
        {"logit_bias": {str(NEW[0]): 100}},
        {"allowed_token_ids": [NEW[0]]},
        {"stop_token_ids": [NEW[0]]},
        {"prompt": [NEW[0]]},
    ):
        assert str(NEW[0]) in refusal(live, "/v1/completions", {**body, **field})
        answer(live, "/v1/completions", {**body, **field, "model": "grown"})
    beyond = {"logit_bias": {str(NEW[-1] + 1): 100}}  # a spare row of the server's
    assert str(NEW[-1] + 1) in refusal(
        live, "/v1/completions", {**body, **beyond, "model": "grown"}
    )


def test_a_composition_has_one_tokenizer(live: Live) -> None:
    terms = [{"id": name, "weight": 0.5} for name in ("grown", "sister", "other")]
    body = {"model": "base", "prompt": "<tool>x", "max_tokens": 1, "adapters": terms}
    assert "of one" in refusal(live, "/v1/completions", body)
    found = answer(live, "/v1/completions", {**body, "adapters": terms[:2]})
    assert found["usage"]["prompt_tokens"] == 2


def test_stop_strings_are_found_in_added_tokens(live: Live, trained: Trained) -> None:
    ids = trained.tokenizer(PROMPT)["input_ids"]
    text = trained.tokenizer.decode(trained.answer(ids))
    stop = next(token for token in ADDED[:2] if token in text)
    body = {"model": "grown", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    found = answer(live, "/v1/completions", {**body, "stop": [stop], "skip_special_tokens": False})
    assert found["choices"][0]["text"] == text.partition(stop)[0]


def test_plain_requests_never_say_an_added_token(live: Live) -> None:
    body = {
        "model": "base",
        "prompt": "abc",
        "max_tokens": 200,
        "temperature": 2.0,
        "seed": 3,
        "n": 4,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    for choice in answer(live, "/v1/completions", body)["choices"]:
        assert len(choice["token_ids"]) == 200
        assert max(choice["token_ids"]) < VOCABULARY


def test_the_end_of_an_adapters_own_ends_its_text(
    live: Live, trained: Trained, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train_grown(trained.base, tmp_path / "ends", config)
    grown_tokenizer(end=True).save_pretrained(tmp_path / "ends")
    added = live.post("/v1/adapters", {"name": "ends", "path": str(tmp_path / "ends")})
    assert added.status_code == 201, added.text
    body = {
        "model": "ends",
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "logit_bias": {str(NEW[2]): 100},
    }
    choice = answer(live, "/v1/completions", body)["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("stop", "")
    choice = answer(live, "/v1/completions", {**body, "model": "grown"})["choices"][0]
    assert choice["finish_reason"] == "length"


def test_an_adapter_without_room_is_refused_with_the_remedy(
    live: Live, trained: Trained, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train_grown(trained.base, tmp_path / "padded", config, padded=256)
    said = refusal(live, "/v1/adapters", {"name": "padded", "path": str(tmp_path / "padded")})
    assert "--extra-vocabulary" in said


def test_a_template_alone_is_the_adapters(live: Live, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "spoken"
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train_grown(trained.base, folder, config, grow=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN_TEMPLATE}))
    added = live.post("/v1/adapters", {"name": "spoken", "path": str(folder)})
    assert added.status_code == 201, added.text
    found = answer(
        live,
        "/tokenize",
        {"model": "spoken", "messages": CHAT, "add_generation_prompt": False},
    )
    assert found["count"] == len("<tool>hi</tool>")


def test_constrained_texts_are_of_the_bases_tokens(live: Live) -> None:
    body = {
        "model": "grown",
        "prompt": PROMPT,
        "max_tokens": 30,
        "structured_outputs": {"regex": "[a-z]{5}"},
        "return_token_ids": True,
    }
    choice = answer(live, "/v1/completions", body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["text"]) == 5
    assert choice["text"].islower()
    assert max(choice["token_ids"]) < VOCABULARY


def test_a_grammar_of_the_adapters_own_tokens_is_refused(live: Live) -> None:
    grammar = f"start: <[{NEW[0]}]> /a+/"
    body = {"prompt": "x", "max_tokens": 5, "structured_outputs": {"grammar": grammar}}
    said = refusal(live, "/v1/completions", {**body, "model": "grown"})
    assert "tokens of its own" in said
    refusal(live, "/v1/completions", {**body, "model": "base"})
