"""Recordings over HTTP: what is kept, for whom, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_support import BASE, Live, expected_text, live_server, make_adapter, make_turbo
from keys_support import bearer, created, keyed_server

from quickchange_server.protocol import Component

ASK = {"model": "sql", "prompt": "Hello", "seed": 3, "max_tokens": 4}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with live_server(tmp_path / "store", recording_seconds=0) as live:
        live.store.add("sql", make_adapter(1.0))
        live.store.alias("live", "sql")
        yield live


def begun(live: Live, name: str = "sql") -> dict[str, Any]:
    response = live.http.put(f"/v1/recordings/{name}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def asked(live: Live, headers: dict[str, str] | None = None, **body: Any) -> str:
    response = live.http.post("/v1/completions", json={**ASK, **body}, headers=headers)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def recorded(live: Live, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What is recorded of `sql`, after all records so far."""
    live.http.put("/v1/recordings/sql", headers=headers)  # its commit comes after theirs
    response = live.http.get("/v1/recordings/sql", headers=headers)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


def test_a_recorded_request_is_its_token_ids_and_what_answered_it(live: Live) -> None:
    assert begun(live)["requests"] == 0
    text = asked(live, user="ana")
    digest = live.store.resolve("sql").digest
    assert text == expected_text(3, 5, 4, Component(digest))
    (kept,) = recorded(live)
    assert kept.keys() == {"digest", "base", "at", "prompt", "output"}
    assert (kept["digest"], kept["base"]) == (digest, BASE)
    assert kept["prompt"] == list(b"Hello")
    assert kept["output"] == list(text.encode())
    (state,) = live.http.get("/v1/recordings").json()["data"]
    assert (state["id"], state["tenant"], state["requests"]) == ("sql", "default", 1)


def test_streams_are_recorded_and_of_several_choices_the_first(live: Live) -> None:
    begun(live)
    live.events("/v1/completions", ASK)
    asked(live, n=3)
    one, other = recorded(live)
    assert one["output"] == other["output"] == list(asked(live).encode())


def test_a_stop_string_ends_what_is_recorded(live: Live) -> None:
    begun(live)
    whole = asked(live, max_tokens=8)
    asked(live, max_tokens=8, stop=whole[4])
    first, second = recorded(live)
    assert len(first["output"]) == 8
    assert second["output"] == first["output"][: whole.index(whole[4]) + 1]


def test_an_alias_stands_for_its_adapter(live: Live) -> None:
    assert begun(live, "live")["id"] == "sql"
    asked(live, model="live")
    assert len(recorded(live)) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"model": BASE},
        {"model": BASE, "adapters": [{"id": "sql", "weight": 0.5}]},
        {"cache_salt": "mine"},
    ],
)
def test_the_base_weighted_adapters_and_salted_requests_are_not_recorded(
    live: Live, body: dict[str, Any]
) -> None:
    begun(live)
    asked(live, **body)
    assert recorded(live) == []


def test_ended_a_recording_is_gone_and_takes_nothing(live: Live) -> None:
    begun(live)
    asked(live)
    ended = live.http.delete("/v1/recordings/sql")
    assert ended.json() == {"id": "sql", "object": "recording.deleted", "deleted": True}
    asked(live)
    for method in ("GET", "DELETE"):
        gone = live.http.request(method, "/v1/recordings/sql")
        assert gone.status_code == 404
        assert "PUT /v1/recordings/sql begins it" in gone.json()["error"]["message"]
    assert recorded(live) == []


def test_a_removed_adapter_takes_its_recording_with_it(live: Live) -> None:
    begun(live)
    asked(live)
    live.http.delete("/v1/aliases/live")
    assert live.http.delete("/v1/adapters/sql").status_code == 200
    assert live.http.get("/v1/recordings").json()["data"] == []
    live.store.add("sql", make_adapter(1.0))
    assert recorded(live) == []


def test_an_unknown_adapter_is_404(live: Live) -> None:
    assert live.http.put("/v1/recordings/nothing").status_code == 404


def test_where_the_setting_leaves_no_room_nobody_records(tmp_path: Path) -> None:
    with live_server(tmp_path / "store", recorded_requests=0) as live:
        live.store.add("sql", make_adapter(1.0))
        refused = live.http.put("/v1/recordings/sql")
        assert refused.status_code == 403
        assert "recorded_requests" in refused.json()["error"]["message"]


def test_a_tenant_records_its_own_requests_and_reads_no_others(tmp_path: Path) -> None:
    with keyed_server(tmp_path / "store", recording_seconds=0) as live:
        live.store.add("sql", make_adapter(1.0))
        keys = {
            (tenant, scope): bearer(created(live, tenant=tenant, scope=scope)[1])
            for tenant in ("acme", "globex")
            for scope in ("infer", "admin")
        }
        acme, globex = keys["acme", "admin"], keys["globex", "admin"]
        assert live.http.put("/v1/recordings/sql", headers=acme).status_code == 200
        asked(live, keys["globex", "infer"], prompt="their secret")
        asked(live, keys["acme", "infer"], prompt="our own")
        (kept,) = recorded(live, acme)
        assert bytes(kept["prompt"]) == b"our own"
        for others in (globex, dict(live.http.headers)):
            assert live.http.get("/v1/recordings/sql", headers=others).status_code == 404
            assert live.http.delete("/v1/recordings/sql", headers=others).status_code == 404
            assert live.http.get("/v1/recordings", headers=others).json()["data"] == []
        own = live.http.get("/v1/recordings/sql", headers=keys["acme", "infer"])
        assert own.status_code == 403
        assert len(recorded(live, acme)) == 1


def test_another_tenants_heads_draft_nothing_for_a_variant_and_fail_no_request(
    tmp_path: Path,
) -> None:
    with keyed_server(tmp_path / "store") as live:
        made = make_turbo(2.0)
        assert made.turbo is not None
        live.store.add("sql", make_adapter(1.0))
        live.store.add("acmes", replace(made, turbo=replace(made.turbo, tenant="acme")))
        acme, globex = (
            bearer(created(live, tenant=tenant, scope="manage")[1]) for tenant in ("acme", "globex")
        )
        variants = [
            {"name": "now", "model": "sql", "weight": 0},
            {"name": "fitted", "model": "sql", "turbo": "acmes"},
        ]
        body = {"name": "drafts", "variants": variants}
        refused = live.http.post("/v1/experiments", json=body, headers=globex)
        assert refused.status_code == 403
        assert live.http.post("/v1/experiments", json=body, headers=acme).status_code == 201
        texts = {}
        for tenant, headers in (("acme", acme), ("globex", globex)):
            answer = live.http.post(
                "/v1/completions",
                json={**ASK, "model": "drafts", "max_tokens": 16, "prompt": "abcabc"},
                headers=headers,
            )
            assert answer.status_code == 200, answer.text
            drafts = "completion_tokens_details" in answer.json()["usage"]
            assert drafts is (tenant == "acme")
            texts[tenant] = answer.json()["choices"][0]["text"]
        assert texts["acme"] == texts["globex"]
        named = live.http.post("/v1/completions", json={**ASK, "turbo": "acmes"}, headers=globex)
        assert named.status_code == 403
