"""vLLM's fields about tokens: their ids, the prompt's log-probabilities, what stopped a choice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour, entries, logprob_at, token_at
from http_support import BASE, Live, live_server
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.api.openai.requests import CompletionRequest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPT, MESSAGES = "Hello", [{"role": "user", "content": "Hi"}]
SEED = 3


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    with live_server(journal.parent / "store", Behaviour(journal=journal)) as live:
        yield live


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    return {"model": BASE, "seed": SEED, "max_tokens": 6, **prompt, **fields}


def prompt_of(live: Live, path: str) -> list[int]:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    ids: list[int] = live.post("/tokenize", prompt).json()["tokens"]
    return ids


def expected(prompt: list[int], count: int) -> list[int]:
    return [token_at(SEED, len(prompt) + i) for i in range(count)]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("turbo", ["off", "lookup"])
def test_token_ids_are_the_prompts_and_the_choices(live: Live, path: str, turbo: str) -> None:
    answer = live.post(path, body(path, return_token_ids=True, turbo=turbo)).json()
    prompt, (choice,) = prompt_of(live, path), answer["choices"]
    assert choice["token_ids"] == expected(prompt, 6)
    told = answer if path == CHAT else choice
    assert told["prompt_token_ids"] == prompt


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("turbo", ["off", "lookup"])
def test_a_streams_events_have_the_ids_that_they_add(live: Live, path: str, turbo: str) -> None:
    *events, _ = live.events(path, body(path, return_token_ids=True, n=2, turbo=turbo))
    prompt = prompt_of(live, path)
    ids: dict[int, list[int]] = {0: [], 1: []}
    for event in events:
        (choice,) = event["choices"]
        ids[choice["index"]] += choice["token_ids"]
    assert ids[0] == expected(prompt, 6)
    assert len(ids[1]) == 6
    if path == CHAT:
        assert [e.get("prompt_token_ids") for e in events] == [prompt] + [None] * (len(events) - 1)
    else:
        told = [e["choices"][0] for e in events if "prompt_token_ids" in e["choices"][0]]
        assert sorted(choice["index"] for choice in told) == [0, 1]
        assert all(choice["prompt_token_ids"] == prompt for choice in told)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_no_ids_are_told_unless_asked_for(live: Live, path: str) -> None:
    answer = live.post(path, body(path)).json()
    assert answer["choices"][0]["token_ids"] is None
    assert "token_ids" not in live.events(path, body(path))[0]["choices"][0]


def test_the_ids_of_a_stop_string_count(live: Live) -> None:
    prompt = prompt_of(live, COMPLETION)
    stop = bytes(expected(prompt, 4)[2:]).decode()
    asked = body(COMPLETION, stop=stop, return_token_ids=True)
    (choice,) = live.post(COMPLETION, asked).json()["choices"]
    assert choice["token_ids"] == expected(prompt, 4)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    told = [event["choices"][0] for event in live.events(COMPLETION, asked)[:-1]]
    assert [i for one in told for i in one["token_ids"]] == expected(prompt, 4)
    assert [one.get("stop_reason") for one in told] == [None] * (len(told) - 1) + [stop]


def test_a_stop_tokens_id_is_the_stop_reason(live: Live) -> None:
    prompt = prompt_of(live, COMPLETION)
    stop = expected(prompt, 3)[-1]
    asked = body(COMPLETION, stop_token_ids=[stop])
    (choice,) = live.post(COMPLETION, asked).json()["choices"]
    assert choice["stop_reason"] == stop


def test_a_choice_that_the_limit_ended_has_no_stop_reason(live: Live) -> None:
    (choice,) = live.post(COMPLETION, body(COMPLETION)).json()["choices"]
    assert choice["stop_reason"] is None


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_tokens_can_be_named_by_their_ids(live: Live, path: str) -> None:
    logprobs = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    asked = body(path, return_tokens_as_token_ids=True, **logprobs)
    told = live.post(path, asked).json()["choices"][0]["logprobs"]
    names = [f"token_id:{i}" for i in expected(prompt_of(live, path), 6)]
    if path == CHAT:
        assert [one["token"] for one in told["content"]] == names
        assert [one["top_logprobs"][0]["token"] for one in told["content"]] == names
    else:
        assert told["tokens"] == names
        assert [list(one) for one in told["top_logprobs"]] == [[name] for name in names]


def test_a_chat_has_its_prompts_logprobs_beside_its_choices(live: Live) -> None:
    answer = live.post(CHAT, body(CHAT, prompt_logprobs=0, n=2)).json()
    prompt = prompt_of(live, CHAT)
    first, *others = answer["prompt_logprobs"]
    assert first is None
    told = [one[str(token)]["logprob"] for one, token in zip(others, prompt[1:], strict=True)]
    assert told == [logprob_at(i, token) for i, token in enumerate(prompt)][1:]
    assert live.post(CHAT, body(CHAT)).json()["prompt_logprobs"] is None


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_prompts_logprobs_are_not_streamed(live: Live, path: str) -> None:
    refused = live.post(path, body(path, prompt_logprobs=1, stream=True))
    assert refused.json()["error"]["param"] == "prompt_logprobs"


# --- prompts that are cut -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 50), st.booleans())
def test_a_cut_prompt_is_the_end_or_the_beginning(ids: list[int], most: int, left: bool) -> None:
    side = "left" if left else "right"
    asked = CompletionRequest(prompt=ids, truncate_prompt_tokens=most, truncation_side=side)
    kept = asked.truncated(ids, 100)
    assert len(kept) == min(most, len(ids))
    assert kept == (ids[len(ids) - len(kept) :] if left else ids[: len(kept)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(2, 100), st.none() | st.integers(1, 200))
def test_a_prompt_cut_to_what_fits_leaves_room(length: int, limit: int, wanted: int | None) -> None:
    asked = CompletionRequest(prompt=[1], truncate_prompt_tokens=-1, max_tokens=wanted)
    kept = asked.truncated([1] * length, limit)
    room = limit - len(kept)
    assert room >= min(limit - 1, wanted or 1)
    assert len(kept) == length or room == min(limit - 1, max(1, wanted or 1))


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_text_is_served_from_its_last_tokens(live: Live, path: str) -> None:
    asked = body(path, truncate_prompt_tokens=3, return_token_ids=True)
    answer = live.post(path, asked).json()
    told = answer if path == CHAT else answer["choices"][0]
    assert told["prompt_token_ids"] == prompt_of(live, path)[-3:]
    assert answer["usage"]["prompt_tokens"] == 3


def test_an_echo_is_of_the_prompt_as_it_was_served(live: Live) -> None:
    asked = body(COMPLETION, truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert live.post(COMPLETION, asked).json()["choices"][0]["text"] == PROMPT[-2:]


def test_a_text_beyond_the_context_is_cut_to_fit(tmp_path: Path) -> None:
    with live_server(tmp_path, max_model_len=32) as live:
        asked = body(COMPLETION, prompt="x" * 100, truncate_prompt_tokens=-1)
        assert live.post(COMPLETION, asked).json()["usage"]["prompt_tokens"] == 26
        said = [{"role": "user", "content": "x" * 100}]
        chat = {**body(CHAT, truncate_prompt_tokens=-1), "messages": said}
        assert live.post(CHAT, chat).json()["usage"]["prompt_tokens"] == 26


@pytest.mark.parametrize("value", [0, -2, 1.5, "4"])
def test_no_other_length_is_taken(live: Live, value: Any) -> None:
    refused = live.post(COMPLETION, body(COMPLETION, truncate_prompt_tokens=value))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


# --- what reaches the engine --------------------------------------------------------------------


def test_the_engine_gets_salts_and_words_as_tokens(live: Live, journal: Path) -> None:
    fields = {"cache_salt": "mine", "bad_words": ["ab", " c"], "allowed_token_ids": [97, 98, 99]}
    assert live.post(COMPLETION, body(COMPLETION, **fields)).status_code == 200
    sent = entries(journal, "Submit")[-1]
    assert sent["cache_salt"] == "mine"
    assert sent["bad_tokens"] == [[97, 98], [99]]
    assert sent["salt"] == ""


@pytest.mark.parametrize("name", ["logprob_token_ids", "allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, 258, 2**40])
def test_ids_outside_the_vocabulary_are_refused_by_name(live: Live, name: str, token: int) -> None:
    refused = live.post(COMPLETION, body(COMPLETION, logprobs=1, **{name: [1, token]}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == name


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_listed_logprobs_need_logprobs(live: Live, path: str) -> None:
    refused = live.post(path, body(path, logprob_token_ids=[1]))
    assert refused.json()["error"]["param"] == "logprob_token_ids"


@pytest.mark.parametrize("words", [[""], [" "], "word", [1], ["x"] * 129])
def test_bad_words_are_words(live: Live, words: Any) -> None:
    refused = live.post(COMPLETION, body(COMPLETION, bad_words=words))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("bad_words")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_request_without_a_model_is_the_bases(live: Live, path: str) -> None:
    asked = body(path)
    del asked["model"]
    assert live.post(path, asked).json()["model"] == BASE


def test_special_tokens_can_be_left_out(live: Live) -> None:
    asked = body(COMPLETION, add_special_tokens=False, return_token_ids=True)
    (choice,) = live.post(COMPLETION, asked).json()["choices"]
    assert choice["prompt_token_ids"] == list(PROMPT.encode())


def test_all_wrong_entries_of_a_bias_are_told(live: Live) -> None:
    keys = {"bad1": 1.0, "7": 1.0, "bad2": 1.0}
    message = live.post(COMPLETION, body(COMPLETION, logit_bias=keys)).json()["error"]["message"]
    assert "'bad1', 'bad2'" in message
    assert "'7'" not in message
    values = {"7": "x", "8": 1.0, "9": 101}
    message = live.post(COMPLETION, body(COMPLETION, logit_bias=values)).json()["error"]["message"]
    assert "'7', '9'" in message


def test_a_token_out_of_vocabulary_is_told_with_its_size(live: Live) -> None:
    refused = live.post(COMPLETION, body(COMPLETION, logit_bias={"999": 1.0})).json()["error"]
    assert "999" in refused["message"]
    assert "258" in refused["message"]
