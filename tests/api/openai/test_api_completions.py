"""/v1/completions and /v1/chat/completions: what is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, expected_text, live_server, make_adapter
from text_support import byte_text

from quickchange_server.frontend.request_admission import choice_seed
from quickchange_server.protocol import Component
from quickchange_store.store import Store

PROMPT = "Hello"
CHAT = [{"role": "user", "content": "Hi"}]
CHAT_TOKENS = len("<user\nHi>\n<assistant\n")  # each mark is one token


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("completions")
    store = Store(folder)
    store.add("sql", make_adapter(1.0))
    store.add("json", make_adapter(2.0))
    missing = store.add("broken", make_adapter(9.0)).digest
    with live_server(folder, Behaviour(missing=frozenset({missing}))) as live:
        yield live


def test_a_completion_has_text_usage_and_identity(live: Live) -> None:
    body = live.post("/v1/completions", {"model": BASE, "prompt": PROMPT, "seed": 3}).json()
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": expected_text(3, len(PROMPT), 16),
        "logprobs": None,
        "finish_reason": "length",
        **dict.fromkeys(("stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs")),
    }
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 16,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["object"] == "text_completion"
    assert body["model"] == BASE
    assert body["id"].startswith("cmpl-")
    assert body["system_fingerprint"].startswith("fp_")


def test_a_chat_is_rendered_by_the_models_template(live: Live) -> None:
    request = {"model": BASE, "messages": CHAT, "seed": 3, "max_tokens": 4}
    body = live.post("/v1/chat/completions", request).json()
    assert body["usage"]["prompt_tokens"] == CHAT_TOKENS
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": expected_text(3, CHAT_TOKENS, 4),
        "refusal": None,
    }
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")


def test_text_parts_and_developer_messages_are_accepted(live: Live) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    rendered = live.post("/tokenize", {"messages": messages}).json()["tokens"]
    plain = [{"role": "system", "content": "x"}, {"role": "user", "content": "a\nb"}]
    assert rendered == live.post("/tokenize", {"messages": plain}).json()["tokens"]


def test_a_chat_may_use_the_rest_of_the_context_by_default(tmp_path: Path) -> None:
    with live_server(tmp_path, max_model_len=64) as live:
        body = live.post("/v1/chat/completions", {"model": BASE, "messages": CHAT}).json()
    assert body["usage"]["total_tokens"] == 64


def test_max_completion_tokens_bounds_a_chat(live: Live) -> None:
    request = {"model": BASE, "messages": CHAT, "max_completion_tokens": 3}
    body = live.post("/v1/chat/completions", request).json()
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], list(b"Hello"), [list(b"Hello")]])
def test_all_forms_of_a_prompt_mean_the_same(live: Live, prompt: object) -> None:
    body = live.post("/v1/completions", {"model": BASE, "prompt": prompt, "seed": 1}).json()
    assert body["choices"][0]["text"] == expected_text(1, 5, 16)


def test_several_prompts_give_n_choices_each_in_order(live: Live) -> None:
    request = {"model": BASE, "prompt": ["ab", "abcd"], "n": 2, "seed": 7, "max_tokens": 6}
    body = live.post("/v1/completions", request).json()
    second = choice_seed(7, 1)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [
        expected_text(7, 2, 6),
        expected_text(second, 2, 6),
        expected_text(7, 4, 6),
        expected_text(second, 4, 6),
    ]
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 24


def test_without_a_seed_two_requests_differ(live: Live) -> None:
    request = {"model": BASE, "prompt": PROMPT}
    texts = {live.post("/v1/completions", request).json()["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 2


def test_a_negative_seed_is_a_seed(live: Live) -> None:
    request = {"model": BASE, "prompt": PROMPT, "seed": -1}
    text = live.post("/v1/completions", request).json()["choices"][0]["text"]
    assert text == expected_text(2**64 - 1, 5, 16)


def test_an_adapter_is_chosen_by_model(live: Live) -> None:
    digest = live.store.resolve("sql").digest
    for model in ("sql", "sql@1", f"sql@{digest[:10]}"):
        body = live.post("/v1/completions", {"model": model, "prompt": PROMPT, "seed": 3}).json()
        assert body["choices"][0]["text"] == expected_text(3, 5, 16, Component(digest))
        assert body["model"] == model


def test_a_composition_reaches_the_engine_with_its_weights(live: Live) -> None:
    terms = [{"id": "sql", "weight": 0.5}, {"id": "json"}]
    request = {"model": BASE, "prompt": PROMPT, "seed": 3, "adapters": terms}
    text = live.post("/v1/completions", request).json()["choices"][0]["text"]
    components = [
        Component(live.store.resolve("sql").digest, 0.5),
        Component(live.store.resolve("json").digest, 1.0),
    ]
    components.sort(key=lambda component: component.digest)
    assert text == expected_text(3, 5, 16, *components)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(live: Live, stream: bool) -> None:
    whole = expected_text(5, 5, 16)
    stop = whole[6:9]
    request = {"model": BASE, "prompt": PROMPT, "seed": 5, "stop": [stop, "\n"]}
    if stream:
        events = live.events("/v1/completions", request)[:-1]
        choices = [event["choices"][0] for event in events]
    else:
        choices = live.post("/v1/completions", request).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


def test_a_stop_string_cancels_the_rest_in_the_engine(tmp_path: Path) -> None:
    with live_server(tmp_path, Behaviour(step_seconds=0.02)) as live:
        stop = expected_text(5, 5, 4)[-1]
        request = {"model": BASE, "prompt": PROMPT, "seed": 5, "stop": stop, "max_tokens": 1000}
        live.post("/v1/completions", request)
        assert live.services.client.in_flight == 0


def test_the_stop_string_is_included_where_asked_for(live: Live) -> None:
    whole = expected_text(5, 5, 16)
    request = {"model": BASE, "prompt": PROMPT, "seed": 5, "stop": whole[6:9]}
    body = live.post("/v1/completions", {**request, "include_stop_str_in_output": True}).json()
    assert body["choices"][0]["text"] == whole[:9]


def test_stop_token_ids_end_a_choice_and_leave_no_text(live: Live) -> None:
    whole = expected_text(5, 5, 16)
    request = {"model": BASE, "prompt": PROMPT, "seed": 5, "stop_token_ids": [ord(whole[3])]}
    choice = live.post("/v1/completions", request).json()["choices"][0]
    assert choice["text"] == whole[: whole.index(whole[3])]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("ignore", [False, True])
def test_ignore_eos_goes_on_past_the_end_of_sequence(tmp_path: Path, ignore: bool) -> None:
    whole = expected_text(5, 5, 16)
    text = byte_text(eos=frozenset({ord(whole[2])}))
    with live_server(tmp_path, text=text) as live:
        request = {"model": BASE, "prompt": PROMPT, "seed": 5, "ignore_eos": ignore}
        choice = live.post("/v1/completions", request).json()["choices"][0]
    assert choice["text"] == (whole if ignore else whole[: whole.index(whole[2])])


def test_completion_logprobs_have_openais_lists(live: Live) -> None:
    request = {"model": BASE, "prompt": PROMPT, "seed": 3, "max_tokens": 3, "logprobs": 1}
    choice = live.post("/v1/completions", request).json()["choices"][0]
    letters = list(choice["text"])
    assert choice["logprobs"] == {
        "tokens": letters,
        "token_logprobs": [-1.0] * 3,
        "top_logprobs": [{letter: -1.0} for letter in letters],
        "text_offset": [0, 1, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_tokens_bytes_and_alternatives(live: Live, stream: bool) -> None:
    request = {"model": BASE, "messages": CHAT, "max_tokens": 3, "logprobs": True}
    request |= {"top_logprobs": 1, "seed": 3}
    if stream:
        events = live.events("/v1/chat/completions", request)[:-1]
        found = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
        content = [entry for logprobs in found for entry in logprobs["content"]]
    else:
        body = live.post("/v1/chat/completions", request).json()
        content = body["choices"][0]["logprobs"]["content"]
    letters = expected_text(3, CHAT_TOKENS, 3)
    tokens = [{"token": c, "logprob": -1.0, "bytes": [ord(c)]} for c in letters]
    assert content == [{**token, "top_logprobs": [token]} for token in tokens]


def test_a_completion_stream_joins_to_the_whole_answer(live: Live) -> None:
    request = {"model": BASE, "prompt": PROMPT, "seed": 3}
    *events, done = live.events("/v1/completions", request)
    assert done == "[DONE]"
    assert "".join(e["choices"][0]["text"] for e in events) == expected_text(3, 5, 16)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 15 + ["length"]
    assert len({e["id"] for e in events}) == 1
    assert "usage" not in events[0]


def test_a_chat_stream_opens_with_the_role(live: Live) -> None:
    request = {"model": BASE, "messages": CHAT, "seed": 3, "max_tokens": 4}
    *events, _ = live.events("/v1/chat/completions", request)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == expected_text(3, CHAT_TOKENS, 4)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_a_stream_ends_with_usage_where_asked_for(live: Live) -> None:
    request = {"model": BASE, "prompt": PROMPT, "stream_options": {"include_usage": True}}
    *events, last, done = live.events("/v1/completions", request)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 21
    assert done == "[DONE]"


def test_streamed_choices_are_told_apart_by_index(live: Live) -> None:
    request = {"model": BASE, "messages": CHAT, "n": 3, "seed": 3, "max_tokens": 5}
    *events, _ = live.events("/v1/chat/completions", request)
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {i: expected_text(choice_seed(3, i), CHAT_TOKENS, 5) for i in range(3)}


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_fails_to_load_answers_424_and_the_server_lives(
    live: Live, stream: bool
) -> None:
    request = {"model": "broken", "prompt": PROMPT, "stream": stream}
    response = live.post("/v1/completions", request)
    assert response.status_code == 424
    assert response.json()["error"]["code"] == "adapter_failed"
    assert live.post("/v1/completions", {"model": "sql", "prompt": PROMPT}).status_code == 200


def test_an_engine_that_fails_in_mid_stream_ends_it_with_an_error_event(tmp_path: Path) -> None:
    behaviour = Behaviour(poison=ord("!"), poison_at=3, step_seconds=0.01)
    with live_server(tmp_path, behaviour, max_request_deaths=1) as live:
        *events, last = live.events("/v1/completions", {"model": BASE, "prompt": "!"})
        assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 3
        assert last["error"]["code"] == "request_failed"
        after = live.post("/v1/completions", {"model": BASE, "prompt": PROMPT})
        assert after.status_code == 200


def test_a_request_in_flight_finishes_on_the_version_it_began_with(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.add("sql", make_adapter(1.0)).digest
    with live_server(tmp_path, Behaviour(step_seconds=0.02)) as live:
        request = {"model": "sql", "prompt": PROMPT, "seed": 3, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=request) as response:
            lines = (line for line in response.iter_lines() if line)
            streamed = [next(lines)]
            second = store.add("sql", make_adapter(2.0)).digest
            after = live.post("/v1/completions", {**request, "stream": False}).json()
            streamed += lines
        chunks = [json.loads(line.removeprefix("data: ")) for line in streamed[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == expected_text(3, 5, 16, Component(first))
        assert after["choices"][0]["text"] == expected_text(3, 5, 16, Component(second))
        old = live.post("/v1/completions", {**request, "stream": False, "model": "sql@1"}).json()
        assert old["choices"][0]["text"] == expected_text(3, 5, 16, Component(first))
