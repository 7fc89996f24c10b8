"""The openai library against a live server, clients that go away, and a drain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import Behaviour, entries
from http_support import (
    BASE,
    LIMIT_SECONDS,
    Live,
    expected_text,
    live_server,
    make_adapter,
    wait_until,
)

from quickchange_server.frontend.request_admission import choice_seed
from quickchange_server.protocol import Component
from quickchange_store.store import Store

CHAT_TOKENS = len("<user\nHi>\n<assistant\n")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("openai")
    Store(folder).add("team/sql", make_adapter(1.0))
    with live_server(folder) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    url = f"{live.url}/v1"
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="Hello", seed=2, max_tokens=8)
    assert answer.choices[0].text == expected_text(2, 5, 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5


def test_streamed_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=BASE, prompt="Hello", seed=2, max_tokens=8, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_text(2, 5, 8)


def test_chats_with_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Hi"}],
        n=2,
        seed=2,
        max_tokens=4,
        logprobs=True,
        top_logprobs=1,
    )
    texts = [choice.message.content for choice in answer.choices]
    seeds = [2, choice_seed(2, 1)]
    assert texts == [expected_text(seed, CHAT_TOKENS, 4) for seed in seeds]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == texts[0]


def test_streamed_chats_with_an_adapter_and_usage(client: openai.OpenAI, live: Live) -> None:
    stream = client.chat.completions.create(
        model="team/sql",
        messages=[{"role": "user", "content": "Hi"}],
        seed=2,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1},
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    component = Component(live.store.resolve("team/sql").digest)
    assert text == expected_text(2, CHAT_TOKENS, 4, component)
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "team/sql", "team/sql@1"]
    assert client.models.retrieve("team/sql").id == "team/sql"


def test_errors_are_the_librarys_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASE, prompt="x", suffix="end")
    assert refused.value.param == "suffix"


def test_an_error_in_mid_stream_is_raised_by_the_library(tmp_path: Path) -> None:
    behaviour = Behaviour(poison=ord("!"), poison_at=2, step_seconds=0.01)
    with (
        live_server(tmp_path, behaviour, max_request_deaths=1) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(model=BASE, prompt="!", stream=True)
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)


# --- clients that go away, and a server that ends -----------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_away_cancels_its_request_and_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stream: bool, n: int
) -> None:
    journal = tmp_path / "journal"
    behaviour = Behaviour(step_seconds=0.02, journal=journal)
    request = {"model": BASE, "prompt": "Hello", "max_tokens": 2000, "stream": stream, "n": n}
    with live_server(tmp_path / "store", behaviour) as live:
        with httpx.Client(base_url=live.url, timeout=0.3) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=request) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=request)
        wait_until(lambda: live.services.client.in_flight == 0)
        wait_until(lambda: len(entries(journal, "Cancel")) == n)
    assert caplog.text == ""


def test_a_drain_finishes_streams_and_refuses_the_rest(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.05)
    request = {"model": BASE, "prompt": "Hello", "seed": 1, "max_tokens": 30, "stream": True}
    with live_server(tmp_path, behaviour, drain_seconds=1000) as live:
        wait_until(lambda: live.http.get("/health").status_code == 200)
        with live.http.stream("POST", "/v1/completions", json=request) as response:
            lines = response.iter_lines()
            first = next(lines)
            live.end()
            wait_until(lambda: live.http.get("/health").status_code == 503)
            assert live.http.get("/health").json() == {"state": "draining"}
            refused = live.post("/v1/completions", {**request, "stream": False})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            rest = [line for line in lines if line]
        assert len([first, *rest]) == 31
        assert rest[-1] == "data: [DONE]"
        live.thread.join(LIMIT_SECONDS)
        assert not live.thread.is_alive(), "it waits for the limit of draining"
