"""SageMaker's calls are answered as the routes that they stand for, errors included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_support import BASE, Live, live_server, make_adapter, write_peft

from quickchange_store.store import Store

CHAT = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "seed": 3, "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "seed": 3, "max_tokens": 4},
    "/v1/embeddings": {"model": BASE, "input": "Hello"},
    "/": {"inputs": "Hello", "parameters": {"seed": 3, "max_new_tokens": 4}},
}
CHANGES = ("id", "created")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("sagemaker")
    Store(folder).add("sql", make_adapter(1.0))
    with live_server(folder) as live:
        yield live


def without_identity(answer: Any) -> Any:
    return (
        {k: v for k, v in answer.items() if k not in CHANGES}
        if isinstance(answer, dict)
        else answer
    )


@pytest.mark.parametrize("path", BODIES)
def test_an_invocation_is_answered_as_its_own_route_does(live: Live, path: str) -> None:
    own, invoked = (live.post(where, BODIES[path]) for where in (path, "/invocations"))
    assert invoked.status_code == 200
    assert without_identity(invoked.json()) == without_identity(own.json())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_invocation_is_streamed_as_well(live: Live, path: str) -> None:
    own, invoked = (live.events(where, BODIES[path]) for where in (path, "/invocations"))
    assert invoked[-1] == "[DONE]"
    assert [without_identity(e) for e in invoked] == [without_identity(e) for e in own]


@pytest.mark.parametrize("path", BODIES)
def test_a_wrong_field_is_refused_in_the_routes_own_form(live: Live, path: str) -> None:
    own, invoked = (
        live.post(where, {**BODIES[path], "a_field_of_tomorrow": 1})
        for where in (path, "/invocations")
    )
    assert invoked.status_code == own.status_code >= 400
    assert invoked.json() == own.json()


@pytest.mark.parametrize("body", [{}, [], 1, {"model": BASE}, {"requestType": "NEW_SESSION"}])
def test_a_body_that_is_nobodys_is_refused(live: Live, body: Any) -> None:
    refused = live.post("/invocations", body)
    assert refused.status_code == 400
    assert "messages" in refused.json()["error"]["message"]


def test_a_body_that_is_no_json_is_refused(live: Live) -> None:
    assert live.http.post("/invocations", content=b"{").status_code == 400


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_the_adapters_header_stands_for_the_model(live: Live, path: str) -> None:
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "sql"}
    answer = live.http.post("/invocations", json=BODIES[path], headers=headers)
    assert answer.json()["model"] == "sql"
    unknown = {"X-Amzn-SageMaker-Adapter-Identifier": "nothing"}
    assert live.http.post("/invocations", json=BODIES[path], headers=unknown).status_code == 404


def test_the_adapters_header_stands_for_loraxs_adapter(live: Live) -> None:
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "sql"}
    answer = live.http.post("/invocations", json=BODIES["/"], headers=headers)
    own = {**BODIES["/"], "parameters": {**BODIES["/"]["parameters"], "adapter_id": "sql"}}
    assert answer.json() == live.post("/", own).json()
    assert answer.json() != live.post("/", BODIES["/"]).json()


def test_adapters_come_and_go(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", 5.0)
    added = live.post("/adapters", {"name": "made", "src": str(folder)})
    assert added.status_code == 200, added.text
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "made"}
    body = BODIES["/v1/completions"]
    assert live.http.post("/invocations", json=body, headers=headers).status_code == 200
    assert live.http.delete("/adapters/made").status_code == 200
    assert live.http.delete("/adapters/made").status_code == 404


def test_an_adapter_that_is_not_there_is_not_found(live: Live) -> None:
    assert live.post("/adapters", {"name": "x", "src": "/not/there"}).status_code == 404


def test_load_is_none_at_rest(live: Live) -> None:
    assert live.http.get("/load").json() == {"server_load": 0}


def test_the_tokenizers_configuration_is_told(live: Live) -> None:
    told = live.http.get("/tokenizer_info").json()
    assert told["tokenizer_class"]
    assert told["eos_token"] == "<|im_end|>"
    assert told["added_tokens_decoder"]["257"] == "<|im_end|>"
    assert "im_start" in told["chat_template"]
