"""LoRAX's routes where keys are asked for, and with an experiment's name as `adapter_id`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_support import BASE, Live, make_adapter
from keys_support import bearer, client_of, created, keyed_server

EXPERIMENT = {
    "name": "acme/tone",
    "variants": [{"name": "a", "model": BASE}, {"name": "b", "model": "other/secret"}],
    "metrics": [{"name": "stars"}],
}
PATHS = ("/generate", "/generate_stream", "/")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with keyed_server(tmp_path_factory.mktemp("lorax-keys")) as live:
        live.store.add("other/secret", make_adapter(1.0))
        live.post("/v1/experiments", EXPERIMENT).raise_for_status()
        yield live


@pytest.fixture(scope="module")
def acme(live: Live) -> Iterator[httpx.Client]:
    """A key that sees acme/* alone."""
    with client_of(live, created(live, names=["acme/*"])[1]) as client:
        yield client


def asked(client: httpx.Client, path: str = "/generate", **parameters: Any) -> httpx.Response:
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 3, "seed": 1, **parameters}}
    return client.post(path, json=body)


def refused(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in LoRAX's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == kind
    return str(body["error"])


# --- experiments --------------------------------------------------------------------------------


def test_an_experiment_is_served_though_its_variants_are_not_seen(acme: httpx.Client) -> None:
    served = {
        asked(acme, adapter_id="acme/tone", user=f"user-{number}").headers["x-quickchange-variant"]
        for number in range(20)
    }
    assert served == {"a", "b"}


def test_all_routes_and_openais_give_a_user_the_same_variant(acme: httpx.Client) -> None:
    for number in range(6):
        user = f"user-{number}"
        body = {"model": "acme/tone", "prompt": "Hello", "max_tokens": 2, "user": user}
        expected = acme.post("/v1/completions", json=body).headers["x-quickchange-variant"]
        for path in PATHS:
            response = asked(acme, path, adapter_id="acme/tone", user=user)
            assert response.headers["x-quickchange-experiment"] == "acme/tone"
            assert response.headers["x-quickchange-variant"] == expected


def test_an_outcome_is_told_by_the_user_of_a_lorax_request(acme: httpx.Client) -> None:
    variant = asked(acme, adapter_id="acme/tone", user="ana").headers["x-quickchange-variant"]
    outcome = {"name": "stars", "value": 4, "unit": "ana"}
    kept = acme.post("/v1/experiments/acme/tone/outcomes", json=outcome)
    assert kept.json()["data"][0]["variant"] == variant


@pytest.mark.parametrize("path", PATHS)
def test_a_variant_that_went_away_is_424_and_names_nothing(
    live: Live, acme: httpx.Client, path: str
) -> None:
    name = f"acme/gone{PATHS.index(path)}"
    live.store.add("other/gone", make_adapter(5.0))
    gone = {"name": "b", "model": "other/gone"}
    body = {**EXPERIMENT, "name": name, "variants": [{**gone, "name": "a"}, gone]}
    live.post("/v1/experiments", body).raise_for_status()
    live.http.delete("/v1/adapters/other/gone").raise_for_status()
    said = refused(asked(acme, path, adapter_id=name), 424, "generation")
    assert "other/gone" not in said
    assert said.startswith("Request failed during generation: adapter_id: ")


# --- names --------------------------------------------------------------------------------------


def told(response: httpx.Response, name: str) -> tuple[int, dict[str, str], bytes]:
    """All that an answer says, its name and what differs with every answer aside."""
    headers = {
        n: v for n, v in response.headers.items() if n not in ("x-request-id", "request-id", "date")
    }
    return response.status_code, headers, response.content.replace(name.encode(), b"NAME")


def merging(name: str, strategy: str) -> dict[str, Any]:
    return {"ids": ["acme/own", name], "weights": [1, 1], "merge_strategy": strategy, "density": 1}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("suffix", ["", "@1"])
@pytest.mark.parametrize("strategy", [None, "linear", "ties"])
def test_what_is_hidden_answers_as_what_is_absent(
    live: Live, acme: httpx.Client, path: str, suffix: str, strategy: str | None
) -> None:
    if "acme/own" not in live.store.names():
        live.store.add("acme/own", make_adapter(2.0))
    answers = []
    for name in ("other/secret", "other/absent"):
        given = (
            {"adapter_id": name + suffix}
            if strategy is None
            else {"merged_adapters": merging(name + suffix, strategy)}
        )
        response = asked(acme, path, **given)
        refused(response, 424, "generation")
        answers.append(told(response, name))
    assert answers[0] == answers[1]


def test_a_hidden_experiment_answers_as_one_that_is_absent(live: Live) -> None:
    with client_of(live, created(live, tenant="rival", names=["rival/*"])[1]) as rival:
        hidden, absent = (asked(rival, adapter_id=name) for name in ("acme/tone", "acme/none"))
    assert hidden.status_code == 424
    assert told(hidden, "acme/tone") == told(absent, "acme/none")


# --- keys and limits ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{}, bearer("qc-nonsense"), {"Authorization": "Basic x"}])
def test_without_a_valid_key_the_answer_is_401_in_loraxs_form(
    live: Live, path: str, headers: dict[str, str]
) -> None:
    with httpx.Client(base_url=live.url, headers=headers) as client:
        response = asked(client, path)
    assert "API key" in refused(response, 401, "authentication")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_route_that_is_above_the_key_s_scope_is_403(acme: httpx.Client) -> None:
    response = acme.get("/metrics")
    assert response.status_code == 403


@pytest.mark.parametrize("path", PATHS)
def test_a_limit_that_is_reached_is_429_in_loraxs_form_and_says_when(live: Live, path: str) -> None:
    _, secret = created(live, names=["acme/*"], limits={"requests_per_minute": 1})
    with client_of(live, secret) as client:
        assert asked(client, path, adapter_id="acme/tone").status_code == 200
        response = asked(client, path, adapter_id="acme/tone")
    assert "requests_per_minute" in refused(response, 429, "overloaded")
    assert 50 <= int(response.headers["retry-after"]) <= 60


def test_a_request_that_never_fits_is_422_and_names_loraxs_field(live: Live) -> None:
    _, secret = created(live, limits={"max_new_tokens": 2})
    with client_of(live, secret) as client:
        said = refused(asked(client), 422, "validation")
        assert "max_new_tokens" in said
        short = client.post("/generate", json={"inputs": "Hello", "parameters": {"details": True}})
    assert short.json()["details"]["generated_tokens"] == 2


def test_a_lorax_request_is_billed_to_its_key(live: Live) -> None:
    key, secret = created(live, tenant="billed")
    with client_of(live, secret) as client:
        asked(client).raise_for_status()
        asked(client, "/generate_stream").raise_for_status()
        rows = client.get("/v1/usage", params={"group": "key,adapter"}).json()["data"]
    assert [(row["key"], row["requests"], row["completion_tokens"]) for row in rows] == [
        (key, 2, 6)
    ]
