"""echo, best_of and prompt_logprobs of /v1/completions, over a live server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import Behaviour, entries, logprob_at
from http_support import BASE, LIMIT_SECONDS, Live, expected_text, live_server

from quickchange_server.frontend.request_admission import choice_seed

BODY = {"model": BASE, "prompt": "Hello", "seed": 2, "max_tokens": 4}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("echo"), Behaviour(sure=False)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        yield client


def prompt_chances(prompt: str) -> list[float | None]:
    chances = [logprob_at(i, ord(letter)) for i, letter in enumerate(prompt)]
    return [None, *chances[1:]]


def output_chances(text: str, prompt_tokens: int) -> list[float]:
    return [logprob_at(prompt_tokens + i, ord(letter)) for i, letter in enumerate(text)]


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(**BODY, echo=True)
    assert answer.choices[0].text == "Hello" + expected_text(2, 5, 4)
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 4)


def test_echo_with_logprobs_has_those_of_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(**BODY, echo=True, logprobs=2)
    text = expected_text(2, 5, 4)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens == list("Hello" + text)
    assert told.text_offset == list(range(9))
    expected = [*prompt_chances("Hello"), *output_chances(text, 5)]
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(expected[1:])
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] is None
    assert list(told.top_logprobs[1]) == ["e", "f"]


def test_scoring_a_prompt_without_generating(client: openai.OpenAI) -> None:
    """What evaluation harnesses ask for."""
    answer = client.completions.create(
        model=BASE, prompt=["Hello", "you"], max_tokens=0, echo=True, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == ["Hello", "you"]
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        expected = prompt_chances(choice.text)
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected[1:])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_echo_without_logprobs_or_new_tokens(live: Live) -> None:
    answer = live.post("/v1/completions", {**BODY, "echo": True, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == "Hello"


def test_a_prompt_of_token_ids_is_echoed_as_text(live: Live) -> None:
    answer = live.post("/v1/completions", {**BODY, "prompt": [72, 105], "echo": True}).json()
    assert answer["choices"][0]["text"] == "Hi" + expected_text(2, 2, 4)


def test_a_stream_begins_with_the_prompt(live: Live) -> None:
    body = {**BODY, "echo": True, "logprobs": 1, "n": 2}
    events = live.events("/v1/completions", body)
    for index in range(2):
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert own[0]["text"] == "Hello"
        assert own[0]["finish_reason"] is None
        text = expected_text(choice_seed(2, index), 5, 4)
        assert "".join(choice["text"] for choice in own) == "Hello" + text
        lists = [choice["logprobs"] for choice in own]
        assert [t for one in lists for t in one["tokens"]] == list("Hello" + text)
        assert [o for one in lists for o in one["text_offset"]] == list(range(9))
        chances = [p for one in lists for p in one["token_logprobs"]]
        assert chances[0] is None
        assert chances[1:] == pytest.approx(
            [*prompt_chances("Hello")[1:], *output_chances(text, 5)]
        )


@pytest.mark.parametrize("n", [1, 2])
def test_best_of_tells_the_likeliest_by_token(client: openai.OpenAI, n: int) -> None:
    answer = client.completions.create(**BODY, n=n, best_of=5)
    texts = [expected_text(choice_seed(2, i), 5, 4) for i in range(5)]
    assert len(set(texts)) == 5
    texts.sort(key=lambda text: sum(output_chances(text, 5)) / 4, reverse=True)
    assert [choice.text for choice in answer.choices] == texts[:n]
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20  # all that were generated


def test_best_of_several_prompts_with_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        **{**BODY, "prompt": ["Hello", "you"]}, best_of=3, n=2, echo=True, logprobs=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["Hel", "Hel", "you", "you"]
    for choice, prompt in zip(answer.choices, ["Hello"] * 2 + ["you"] * 2, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        told = choice.logprobs.token_logprobs[1 : len(prompt)]
        assert told == pytest.approx(prompt_chances(prompt)[1:])


def test_prompt_logprobs_have_vllms_form(live: Live) -> None:
    answer = live.post("/v1/completions", {**BODY, "prompt_logprobs": 1, "n": 2}).json()
    for choice in answer["choices"]:
        told = choice["prompt_logprobs"]
        assert told[0] is None
        assert len(told) == 5
        e = {"logprob": pytest.approx(logprob_at(1, ord("e"))), "rank": 1, "decoded_token": "e"}
        assert told[1] == {str(ord("e")): e}
        assert choice["logprobs"] is None
    none = live.post("/v1/completions", {**BODY, "prompt_logprobs": 0}).json()["choices"][0]
    assert none["prompt_logprobs"][1][str(ord("e"))]["rank"] is None


def test_the_prompt_is_read_once_for_all_its_choices(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with live_server(tmp_path / "store", Behaviour(journal=journal)) as live:
        live.post("/v1/completions", {**BODY, "n": 3, "echo": True, "logprobs": 0})
        live.post("/v1/completions", BODY)
    read = [entry["prompt_logprobs"] for entry in entries(journal, "Submit")]
    assert read == [0, None, None, None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    live: Live, change: dict[str, Any], param: str
) -> None:
    refused = live.post("/v1/completions", {**BODY, **change})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_a_stream_with_best_of_equal_to_n_is_served(live: Live) -> None:
    events = live.events("/v1/completions", {**BODY, "best_of": 1})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == expected_text(2, 5, 4)
