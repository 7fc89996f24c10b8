"""The setting max_logprobs bounds what requests ask for, up to the whole vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server
from text_support import byte_text

from quickchange_server.frontend.request_admission import FEW_BEST, MOST_BEST

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
VOCABULARY = byte_text().vocab_size
FIELDS = [(COMPLETION, "logprobs"), (CHAT, "top_logprobs")]
FIELDS += [(path, "prompt_logprobs") for path in (COMPLETION, CHAT)]


def body(path: str, **fields: Any) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    return {
        "model": BASE,
        "max_tokens": 2,
        **(chat if path == CHAT else {"prompt": "Hi"}),
        **fields,
    }


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("usual")) as live:
        yield live


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "journal"


@pytest.fixture(scope="module")
def whole(journal: Path) -> Iterator[Live]:
    with live_server(journal.parent, Behaviour(journal=journal), max_logprobs=-1) as live:
        yield live


@pytest.mark.parametrize(("path", "field"), FIELDS)
@pytest.mark.parametrize(("asked", "counted"), [(21, 21), (-1, VOCABULARY), (2**31 - 1, 2**31 - 1)])
def test_more_than_the_setting_is_refused_by_name(
    live: Live, path: str, field: str, asked: int, counted: int
) -> None:
    assert live.post(path, body(path, **{field: 20})).status_code == 200
    refused = live.post(path, body(path, **{field: asked}))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, field)
    assert f"logprobs of {counted}, which is greater than max allowed: 20" in error["message"]


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_less_than_the_whole_vocabulary_is_refused(whole: Live, path: str, field: str) -> None:
    for asked in (-2, 2**31, 1.5):
        refused = whole.post(path, body(path, **{field: asked}))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(("path", "field"), FIELDS)
@pytest.mark.parametrize("asked", [-1, VOCABULARY, 21])
def test_the_engine_gets_a_number_of_tokens(
    whole: Live, journal: Path, path: str, field: str, asked: int
) -> None:
    answer = whole.post(path, body(path, **{field: asked}))
    assert answer.status_code == 200, answer.text
    (*_, last) = (
        entry for line in journal.read_text().splitlines() if (entry := json.loads(line))["prompt"]
    )
    ours = "prompt_logprobs" if field == "prompt_logprobs" else "logprobs"
    assert last[ours] == (VOCABULARY if asked == -1 else asked)


def test_a_prompts_log_probabilities_of_all_tokens_are_told(whole: Live) -> None:
    answer = whole.post(COMPLETION, body(COMPLETION, prompt_logprobs=-1, prompt=[1, 2])).json()
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [entry["rank"] for entry in second.values()] == [*range(1, VOCABULARY + 1)]


def test_an_echo_with_all_log_probabilities_has_the_prompts_too(whole: Live) -> None:
    echoed = body(COMPLETION, logprobs=-1, prompt_logprobs=2, echo=True, prompt=[1, 2])
    (choice,) = whole.post(COMPLETION, echoed).json()["choices"]
    assert len(choice["prompt_logprobs"][1]) == 2
    tops = choice["logprobs"]["top_logprobs"]
    assert tops[0] is None
    assert len(tops[1]) > FEW_BEST


LARGE: list[tuple[str, dict[str, Any]]] = [
    (COMPLETION, {"logprobs": -1, "n": 5, "max_tokens": 2_000}),
    (COMPLETION, {"prompt_logprobs": -1, "prompt": [[1] * 2_000] * 5}),
    (CHAT, {"top_logprobs": VOCABULARY, "n": 5}),
]


@pytest.mark.parametrize(("path", "large"), LARGE)
def test_an_answer_that_would_not_fit_is_refused(
    whole: Live, path: str, large: dict[str, Any]
) -> None:
    assert 5 * 2_000 * VOCABULARY > MOST_BEST
    refused = whole.post(path, {**body(path), "max_tokens": None, **large})
    assert refused.status_code == 400, refused.text
    assert f"of {MOST_BEST} at most" in refused.json()["error"]["message"]
    small = {"max_tokens": 1, "prompt": "Hi"} if path == COMPLETION else {"max_tokens": 1}
    assert whole.post(path, {**body(path), **large, **small}).status_code == 200
