"""API keys over HTTP: made once shown, changed, rotated, revoked, expired; here and elsewhere."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from http_support import Live, live_server, wait_until
from keys_support import COMPLETION, bearer, client_of, created, keyed_server, make_key

from quickchange_server.tenants.key_secret import digest_of

REPLICA_SECONDS = 2.5  # a look a second, and some time for a busy machine


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with keyed_server(tmp_path_factory.mktemp("keys")) as live:
        yield live


def status_of(live: Live, secret: str | None, path: str = "/v1/models") -> int:
    with client_of(live, secret) as client:
        return client.get(path).status_code


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def test_without_a_key_the_answer_is_401_and_says_how(live: Live) -> None:
    with client_of(live, None) as client:
        response = client.get("/v1/models")
    assert "Authorization: Bearer" in refused(response, 401)
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers


def test_a_created_key_works_at_once_in_either_header(live: Live) -> None:
    _, secret = created(live)
    assert status_of(live, secret) == 200
    with client_of(live, None) as client:
        assert client.get("/v1/models", headers={"x-api-key": secret}).status_code == 200
        lower = {"Authorization": f"bearer {secret}"}
        assert client.get("/v1/models", headers=lower).status_code == 200


@pytest.mark.parametrize(
    "secret", ["x", "EMPTY", "qc-0123456789abcdef-" + "0" * 64, "qc-x-y", "ä" * 9]
)
def test_a_wrong_key_is_401(live: Live, secret: str) -> None:
    header = b"Bearer " + secret.encode()
    with client_of(live, None) as client:
        response = client.get("/v1/models", headers={b"authorization": header})
    assert "not valid" in refused(response, 401)


def test_the_right_id_with_another_secret_is_401(live: Live) -> None:
    _, secret = created(live)
    assert status_of(live, secret[:-1] + ("0" if secret[-1] != "0" else "1")) == 401


def test_a_bad_body_without_a_key_is_401_since_nobody_reads_it(live: Live) -> None:
    with client_of(live, None) as client:
        assert client.post("/v1/completions", content=b"{").status_code == 401


def test_the_secret_is_in_the_first_answer_alone_and_not_in_the_database(live: Live) -> None:
    key_id, secret = created(live, label="billing robot")
    assert secret.split("-")[1] == key_id
    assert secret not in live.http.get(f"/v1/keys/{key_id}").text
    assert secret not in live.http.get("/v1/keys").text
    with sqlite3.connect(Path(live.store.location) / "quickchange.sqlite3") as database:
        row = database.execute("SELECT * FROM api_keys WHERE id = ?", (key_id,)).fetchone()
    database.close()
    assert secret not in map(str, row)
    assert secret.split("-")[2] not in "".join(map(str, row))
    assert digest_of(secret) in row


def test_a_key_is_shown_as_it_was_made(live: Live) -> None:
    expires = time.time() + 1000
    limits = {"requests_per_minute": 5, "max_new_tokens": 7}
    body = {"tenant": "shown", "scope": "manage", "names": ["a/*", "b"], "label": "x"}
    key_id, _ = created(live, **body, limits=limits, expires=expires)
    shown = live.http.get(f"/v1/keys/{key_id}").json()
    assert {name: shown[name] for name in body} == body
    assert (shown["expires"], shown["state"]) == (expires, "valid")
    given = {name: value for name, value in shown["limits"].items() if value is not None}
    assert given == limits
    listed = live.http.get("/v1/keys", params={"tenant": "shown"}).json()["data"]
    assert listed == [shown]


def test_a_change_replaces_what_it_gives_and_keeps_the_rest(live: Live) -> None:
    key_id, secret = created(live, limits={"requests_per_minute": 5}, expires=time.time() + 1000)
    changed = live.http.patch(f"/v1/keys/{key_id}", json={"scope": "manage", "expires": None})
    assert changed.status_code == 200, changed.text
    assert (changed.json()["scope"], changed.json()["expires"]) == ("manage", None)
    assert changed.json()["limits"]["requests_per_minute"] == 5
    assert status_of(live, secret, "/v1/adapters") == 200
    unlimited = live.http.patch(f"/v1/keys/{key_id}", json={"limits": None}).json()
    assert set(unlimited["limits"].values()) == {None}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tenant": "a b"}, "tenant"),
        ({"names": []}, "names"),
        ({"names": None}, "names"),
        ({"scope": "root"}, "scope"),
        ({"scope": "admin", "names": ["a*"]}, "names"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"per_day": 1}}, "limits.per_day"),
        ({"expires": -1}, "expires"),
        ({"tenants": "x"}, "tenants"),
    ],
)
def test_a_bad_field_is_named(live: Live, body: dict[str, object], param: str) -> None:
    response = live.post("/v1/keys", {"tenant": "acme", "names": ["*"], **body})
    refused(response, 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")],
)
def test_an_unknown_key_is_404(live: Live, method: str, path: str) -> None:
    body = {} if method in ("PATCH", "POST") else None
    response = live.http.request(method, f"/v1/keys/0000{path}", json=body)
    assert "no API key '0000'" in refused(response, 404)


def test_a_revoked_key_ends_at_once_and_for_good(live: Live) -> None:
    key_id, secret = created(live)
    assert live.http.delete(f"/v1/keys/{key_id}").json()["state"] == "revoked"
    assert status_of(live, secret) == 401
    assert "revoked" in refused(live.http.post(f"/v1/keys/{key_id}/rotate"), 409)
    assert live.http.patch(f"/v1/keys/{key_id}", json={"label": "x"}).status_code == 409
    assert live.http.delete(f"/v1/keys/{key_id}").json()["state"] == "revoked"


def test_an_expired_key_is_401_and_says_so(live: Live) -> None:
    _, secret = created(live, expires=time.time() - 1)
    with client_of(live, secret) as client:
        assert "expired" in refused(client.get("/v1/models"), 401)


def test_a_key_expires_while_the_server_runs(live: Live) -> None:
    _, secret = created(live, expires=time.time() + 1)
    assert status_of(live, secret) == 200
    wait_until(lambda: status_of(live, secret) == 401, seconds=5)


def test_after_a_rotation_both_secrets_work_until_the_overlap_ends(live: Live) -> None:
    key_id, old = created(live)
    rotated = live.http.post(f"/v1/keys/{key_id}/rotate", json={"overlap_seconds": 1.0}).json()
    new = rotated["secret"]
    assert rotated["old_secret_until"] == pytest.approx(time.time() + 1, abs=0.9)
    assert (status_of(live, old), status_of(live, new)) == (200, 200)
    wait_until(lambda: status_of(live, old) == 401, seconds=5)
    assert status_of(live, new) == 200


def test_a_rotation_without_overlap_ends_the_old_secret_at_once(live: Live) -> None:
    key_id, old = created(live)
    new = live.http.post(f"/v1/keys/{key_id}/rotate", json={"overlap_seconds": 0}).json()["secret"]
    assert (status_of(live, old), status_of(live, new)) == (401, 200)


def test_a_second_rotation_ends_the_first_secret(live: Live) -> None:
    key_id, first = created(live)
    second = live.http.post(f"/v1/keys/{key_id}/rotate").json()["secret"]
    third = live.http.post(f"/v1/keys/{key_id}/rotate").json()["secret"]
    assert [status_of(live, secret) for secret in (first, second, third)] == [401, 200, 200]


def test_revoking_a_rotated_key_ends_both_secrets(live: Live) -> None:
    key_id, old = created(live)
    new = live.http.post(f"/v1/keys/{key_id}/rotate").json()["secret"]
    live.http.delete(f"/v1/keys/{key_id}")
    assert (status_of(live, old), status_of(live, new)) == (401, 401)


def test_what_one_replica_does_another_acts_on_within_seconds(live: Live) -> None:
    with live_server(Path(live.store.location), api_keys=True) as other:
        key_id, secret = created(live)
        wait_until(lambda: status_of(other, secret) == 200, seconds=REPLICA_SECONDS)
        live.http.delete(f"/v1/keys/{key_id}").raise_for_status()
        wait_until(lambda: status_of(other, secret) == 401, seconds=REPLICA_SECONDS)


def test_a_key_made_in_the_database_works_within_seconds(live: Live) -> None:
    _, secret = make_key(Path(live.store.location))
    wait_until(lambda: status_of(live, secret) == 200, seconds=REPLICA_SECONDS)


def test_the_openai_client_works_with_its_api_key(live: Live) -> None:
    _, secret = created(live)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0) as client:
        answer = client.completions.create(**COMPLETION)  # type: ignore[call-overload]
        assert answer.usage.completion_tokens == 4
    wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_without_keys_any_key_is_taken_and_keys_can_be_made_ahead(tmp_path: Path) -> None:
    with live_server(tmp_path) as live:
        assert live.http.get("/v1/models", headers=bearer("EMPTY")).status_code == 200
        _, secret = created(live)
    with live_server(tmp_path, api_keys=True) as live:
        assert (status_of(live, secret), status_of(live, None)) == (200, 401)
