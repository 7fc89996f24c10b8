"""Experiments where keys are asked for: scopes, what a key sees, and whose outcomes are whose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_support import BASE, Live, make_adapter
from keys_support import client_of, created, keyed_server

VARIANTS = [{"name": "a", "model": BASE}, {"name": "b", "model": "hidden"}]
TONE = {"name": "acme/tone", "variants": VARIANTS, "metrics": [{"name": "stars"}]}
ASK = {"model": "acme/tone", "prompt": "Hello", "max_tokens": 2, "user": "u"}
ROUTE = "/v1/experiments/acme/tone"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with keyed_server(tmp_path_factory.mktemp("keyed")) as live:
        live.store.add("hidden", make_adapter(1.0))
        live.post("/v1/experiments", TONE).raise_for_status()
        yield live


def secret_of(live: Live, scope: str, tenant: str = "acme", names: str = "acme/*") -> str:
    return created(live, scope=scope, tenant=tenant, names=[names])[1]


def test_a_key_uses_an_experiment_whose_variants_it_does_not_see(live: Live) -> None:
    with client_of(live, secret_of(live, "infer")) as client:
        got = {
            client.post("/v1/completions", json={**ASK, "user": str(n)}).headers[
                "x-quickchange-variant"
            ]
            for n in range(20)
        }
        assert got == {"a", "b"}
        names = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert names == {BASE, "acme/tone"}


def test_outcomes_take_infer_and_all_else_manage(live: Live) -> None:
    with client_of(live, secret_of(live, "infer")) as client:
        completion = client.post("/v1/completions", json=ASK).json()["id"]
        outcome = {"completion": completion, "name": "stars", "value": 4}
        assert client.post(f"{ROUTE}/outcomes", json=outcome).status_code == 201
        assert client.get(ROUTE).status_code == 403
        assert client.get(f"{ROUTE}/results").status_code == 403
        assert client.post(f"{ROUTE}/pause").status_code == 403
        assert client.post("/v1/experiments", json=TONE).status_code == 403
    with client_of(live, secret_of(live, "manage")) as client:
        assert client.get(f"{ROUTE}/results").status_code == 200


def test_an_experiment_that_is_not_seen_does_not_exist(live: Live) -> None:
    with client_of(live, secret_of(live, "manage", "other", "other/*")) as client:
        hidden = client.post("/v1/completions", json=ASK)
        absent = client.post("/v1/completions", json={**ASK, "model": "acme/none"})
        assert (hidden.status_code, absent.status_code) == (404, 404)
        assert hidden.json()["error"]["message"] == absent.json()["error"]["message"].replace(
            "acme/none", "acme/tone"
        )
        for route in ("", "/results", "/audit"):
            assert client.get(ROUTE + route).status_code == 404
        assert client.get("/v1/experiments").json()["data"] == []


def test_a_manager_can_not_serve_by_an_experiment_what_it_does_not_see(live: Live) -> None:
    with client_of(live, secret_of(live, "manage")) as client:
        refused = client.post("/v1/experiments", json={**TONE, "name": "acme/mine"})
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "variants[1].model"
        outside = client.post("/v1/experiments", json={**TONE, "name": "mine"})
        assert outside.status_code == 403


def test_another_tenants_completion_has_no_outcome(live: Live) -> None:
    with client_of(live, secret_of(live, "infer")) as client:
        completion = client.post("/v1/completions", json=ASK).json()["id"]
    with client_of(live, secret_of(live, "infer", "rival")) as client:
        outcome = {"name": "stars", "value": 4}
        by_id = client.post(f"{ROUTE}/outcomes", json={**outcome, "completion": completion})
        by_unit = client.post(f"{ROUTE}/outcomes", json={**outcome, "unit": "u"})
        assert (by_id.status_code, by_unit.status_code) == (404, 404)


def test_a_hidden_turbo_stays_hidden_beside_an_experiment(live: Live) -> None:
    with client_of(live, secret_of(live, "infer")) as client:
        refused = client.post("/v1/completions", json={**ASK, "turbo": "hidden"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "turbo")


def test_an_alias_outside_a_key_s_names_is_neither_given_nor_taken_back(live: Live) -> None:
    variants = [{"name": "a", "model": "hidden"}, {"name": "b", "model": "hidden"}]
    body = {"name": "acme/ours", "variants": variants, "alias": "theirs"}
    live.post("/v1/experiments", body).raise_for_status()
    route = "/v1/experiments/acme/ours"
    live.post(f"{route}/promote", {"variant": "b"}).raise_for_status()
    with client_of(live, secret_of(live, "manage")) as client:
        assert client.post(f"{route}/promote", json={"variant": "a"}).status_code == 403
        assert client.post(f"{route}/rollback").status_code == 403
    assert "theirs" in live.store.aliases()


def test_the_weights_of_variants_that_a_manager_does_not_see_can_be_changed(live: Live) -> None:
    with client_of(live, secret_of(live, "manage")) as client:
        changed = client.patch(ROUTE, json={"weights": {"b": 1}})
        assert changed.status_code == 200, changed.text


def test_the_audit_trail_names_the_key(live: Live) -> None:
    key, secret = created(live, scope="manage", tenant="acme", names=["*"])
    with client_of(live, secret) as client:
        client.patch(ROUTE, json={"description": "formal"}).raise_for_status()
        entry = client.get(f"{ROUTE}/audit").json()["data"][0]
    assert (entry["action"], entry["tenant"], entry["key"]) == ("update", "acme", key)
