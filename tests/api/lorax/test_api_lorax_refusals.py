"""LoRAX's routes: what is refused, by which name, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, MODULE, Live, live_server, make_adapter, make_turbo, wait_until
from text_support import byte_text

from quickchange_server.api.lorax.requests import Parameters
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store

TWO = {"ids": ["sql", "json"], "weights": [1.0, 1.0], "density": 0.5}


def bottleneck() -> CanonicalAdapter:
    adapter = make_adapter(4.0)
    update = replace(adapter.updates[MODULE], activation="relu")
    return replace(adapter, updates={MODULE: update})


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("lorax")
    store = Store(folder)
    store.add("sql", make_adapter(1.0))
    store.add("json", make_adapter(2.0))
    store.add("heads", make_turbo(3.0))
    store.add("houlsby", bottleneck())
    missing = store.add("broken", make_adapter(9.0)).digest
    with live_server(folder, Behaviour(missing=frozenset({missing}))) as live:
        yield live


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.0}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"typical_p": 1.0}, "typical_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": -1}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"truncate": 0}, "truncate"),
        ({"truncate": 2048}, "`truncate` must be strictly positive and less than 2048"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "stop[0]"),
        ({"watermark": True}, "watermark"),
        ({"grammar": {"type": "lark", "value": "a+"}}, "grammar: "),
        ({"grammar": {"type": "regex"}}, "grammar.value"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
        ({"grammar": {"type": "regex", "value": "("}}, "grammar.value"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar.value"),
        ({"grammar": {"type": "json", "value": {"not": {}}}}, "grammar.value"),
        ({"grammar": {"type": "json_schema", "value": "{}"}}, "grammar.value"),
        ({"grammar": {"type": "json_schema", "value": {"name": "x"}}}, "schema: is required"),
        (
            {
                "grammar": {"type": "regex", "value": "a"},
                "response_format": {"type": "json_object"},
            },
            "both constrain the text",
        ),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"top_n_tokens": -1}, "top_n_tokens"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"adapter_source": "moon"}, "adapter_source"),
        ({"do_sample": 1}, "do_sample"),
        ({"nonsense": 1}, "nonsense: unknown field"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"adapter_id": "sql", "merged_adapters": TWO}, "at most one of `adapter_id`"),
        ({"merged_adapters": {**TWO, "ids": []}}, "merged_adapters.ids"),
        ({"merged_adapters": {**TWO, "weights": [1.0]}}, "one weight for each id"),
        ({"merged_adapters": {**TWO, "merge_strategy": "slerp"}}, "merge_strategy"),
        ({"merged_adapters": {**TWO, "majority_sign_method": "x"}}, "majority_sign_method"),
        ({"merged_adapters": {**TWO, "density": 1.5}}, "merged_adapters.density"),
        (
            {"merged_adapters": {**TWO, "merge_strategy": "ties", "density": 0}},
            "merged_adapters.density",
        ),
        ({"merged_adapters": {**TWO, "ids": ["sql", "heads"]}}, "merged_adapters.ids[1]"),
        (
            {"merged_adapters": {**TWO, "ids": ["sql", "sql"], "merge_strategy": "ties"}},
            "each adapter once",
        ),
        (
            {"merged_adapters": {**TWO, "ids": ["sql", "houlsby"], "merge_strategy": "ties"}},
            "bottleneck",
        ),
        ({"response_format": {"type": "regex", "schema": {}}}, "response_format.type"),
        (
            {"max_new_tokens": 2048},
            "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 5 `inputs` tokens and 2048",
        ),
    ],
)
def test_a_wrong_parameter_gets_422_and_its_name(
    live: Live, parameters: dict[str, Any], said: str
) -> None:
    response = live.post("/generate", {"inputs": "Hello", "parameters": parameters})
    assert response.status_code == 422
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == "validation"
    assert body["error"].startswith("Input validation error: ")
    assert said in body["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({}, "inputs: is required"),
        ({"inputs": "\ud800"}, "inputs"),
        ([], "must be a JSON object"),
        ({"inputs": "x" * 2048}, "`inputs` must have less than 2048 tokens. Given: 2048"),
    ],
)
def test_a_wrong_body_gets_422(live: Live, body: Any, said: str) -> None:
    response = live.post("/", body)
    assert response.status_code == 422
    assert said in response.json()["error"]


@pytest.mark.parametrize("parameter", [{"best_of": 2, "top_k": 2}, {"decoder_input_details": True}])
def test_what_a_stream_has_not_is_refused_before_it_begins(
    live: Live, parameter: dict[str, Any]
) -> None:
    body = {"inputs": "x", "parameters": parameter, "stream": True}
    response = live.post("/", body)
    assert response.status_code == 422
    assert "not supported when streaming tokens" in response.json()["error"]


@pytest.mark.parametrize("source", ["hub", "s3", "pbase", "local"])
def test_an_adapter_that_is_not_there_gets_424_and_how_to_add_it(live: Live, source: str) -> None:
    for name in ("owner/unknown", "/data/adapters/one"):
        body = {"inputs": "x", "parameters": {"adapter_id": name, "adapter_source": source}}
        response = live.post("/generate", body)
        assert response.status_code == 424
        assert response.json()["error_type"] == "generation"
        said = response.json()["error"]
        assert said.startswith("Request failed during generation: adapter_id: there is no")
        assert f"'{name}'" in said
        assert f"nothing is fetched from '{source}'" in said
        assert "quickchange adapters add" in said


def test_an_adapter_that_cannot_be_loaded_gets_424(live: Live) -> None:
    response = live.post("/generate", {"inputs": "x", "parameters": {"adapter_id": "broken"}})
    assert response.status_code == 424
    assert response.json()["error_type"] == "generation"


def test_a_tokens_secret_is_in_no_error_and_no_repr(live: Live) -> None:
    parameters = {"api_token": "hf_secret", "top_k": 0}
    assert "hf_secret" not in live.post("/generate", {"inputs": "x", "parameters": parameters}).text
    assert "hf_secret" not in repr(Parameters(api_token="hf_secret"))


def test_too_many_requests_get_429_and_when_to_come_again(tmp_path: Path) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 500}}
    with (
        live_server(tmp_path, Behaviour(step_seconds=0.05), max_queue=1) as live,
        live.http.stream("POST", "/generate_stream", json=body) as running,
    ):
        lines = running.iter_lines()  # kept: its end would close the stream
        next(lines)
        response = live.post("/generate", body)
    assert response.status_code == 429
    assert response.json()["error_type"] == "overloaded"
    assert response.json()["error"].startswith("Model is overloaded: ")
    assert int(response.headers["retry-after"]) >= 1


def test_an_engine_that_starts_gets_503(tmp_path: Path) -> None:
    with live_server(tmp_path, Behaviour(start_seconds=20)) as live:
        response = live.post("/generate", {"inputs": "x"})
        assert live.http.get("/info").status_code == 503
    assert response.status_code == 503
    assert response.json()["error"].startswith("unhealthy: ")


def test_a_failure_in_mid_stream_is_an_event_of_loraxs_form(tmp_path: Path) -> None:
    behaviour = Behaviour(poison=ord("!"), poison_at=2, step_seconds=0.01)
    with live_server(tmp_path, behaviour, max_request_deaths=1) as live:
        lines = live.post("/generate_stream", {"inputs": "!"}).text.splitlines()
    *_, last = [line for line in lines if line]
    assert '"error_type":"generation"' in last


def test_other_errors_of_the_routes_have_the_same_form(live: Live) -> None:
    response = live.http.post("/generate", content=b"{", headers={"Content-Type": "text/plain"})
    assert set(response.json()) == {"error", "error_type"}
    response = live.http.post("/generate", content=b"{")
    assert set(response.json()) == {"error", "error_type"}


def test_a_wrong_method_has_the_same_form_and_says_which_is_right(live: Live) -> None:
    response = live.http.get("/generate")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST, OPTIONS"
    assert set(response.json()) == {"error", "error_type"}


def test_openais_routes_keep_openais_errors(live: Live) -> None:
    error = live.post("/v1/completions", {"model": BASE, "prompt": "x", "n": 0}).json()["error"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_client_that_goes_away_ends_its_request(tmp_path: Path) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2000}}
    with live_server(
        tmp_path, Behaviour(step_seconds=0.02), text=byte_text(eos=frozenset())
    ) as live:
        with live.http.stream("POST", "/generate_stream", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert live.services.client.in_flight == 1
        wait_until(lambda: live.services.client.in_flight == 0)
