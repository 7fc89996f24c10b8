"""The server opens its database as it starts, counts what it does, and closes it at the end; keys,
experiments and usage work over HTTP on either kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from http_support import BASE, Live, live_server
from keys_support import bearer, created

from quickchange_server.storage.database import Database
from quickchange_server.tenants import key_records
from quickchange_server.tenants.key import Terms


@contextmanager
def keyed(store: Path, url: str) -> Iterator[Live]:
    """A server that asks for keys; its client brings an admin's."""

    async def make_key() -> str:
        database = Database.open(url)
        terms = Terms("operator", "admin", ("*",))
        _, secret = await database.write(partial(key_records.create, terms=terms, now=time.time()))
        await database.close()
        return secret

    secret = asyncio.run(make_key())
    with live_server(store, database=url, api_keys=True) as live:
        live.http.headers.update(bearer(secret))
        yield live


def test_a_server_opens_the_database_of_its_settings(tmp_path: Path, database_url: str) -> None:
    with live_server(tmp_path / "store", database=database_url) as live:
        text = live.http.get("/metrics").text
    assert "\nquickchange_storage_queue 0.0\n" in text
    assert "\nquickchange_storage_lost_total 0.0\n" in text
    assert "\nquickchange_storage_commit_seconds_count 0.0\n" in text


def test_a_server_without_the_setting_keeps_its_file_beside_the_adapters(tmp_path: Path) -> None:
    with live_server(tmp_path / "store"):
        assert (tmp_path / "store" / "quickchange.sqlite3").stat().st_mode & 0o777 == 0o600
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert "quickchange.sqlite3-wal" not in names  # closing folds the log into the file


def test_keys_experiments_and_usage_work_over_http(tmp_path: Path, database_url: str) -> None:
    variants = [{"name": "a", "model": BASE}, {"name": "b", "model": BASE}]
    metrics = [{"name": "ok", "kind": "flag"}, {"name": "mood", "kind": "label"}]
    tone = {"name": "tone", "variants": variants, "metrics": metrics}
    route, ask = "/v1/experiments/tone", {"model": "tone", "prompt": "Hello", "max_tokens": 2}
    with keyed(tmp_path / "store", database_url) as live:
        key, secret = created(live, tenant="acme")
        live.post("/v1/experiments", tone).raise_for_status()
        administrator = {"Authorization": live.http.headers["Authorization"]}
        live.http.headers.update(bearer(secret))
        for number in range(6):
            answer = live.post("/v1/completions", {**ask, "user": f"user-{number}"}).json()
            told = [
                {"name": "ok", "value": number > 1, "completion": answer["id"]},
                {"name": "mood", "value": "glad", "unit": f"user-{number}"},
            ]
            live.post(f"{route}/outcomes", {"outcomes": told}).raise_for_status()
        (row,) = live.http.get("/v1/usage").json()["data"]
        live.http.headers.update(administrator)
        results = live.http.get(f"{route}/results").json()
    assert (row["key"], row["requests"], row["completion_tokens"]) == (key, 6, 12)
    outcomes = {outcome["name"]: outcome["variants"] for outcome in results["outcomes"]}
    assert sum(v["count"] * (v["mean"] or 0) for v in outcomes["ok"]) == pytest.approx(4)
    assert sum(v["count"] for v in outcomes["mood"]) == 6


@pytest.mark.parametrize("path", ["/v1/keys/%00", "/v1/keys/%F0%9F", "/v1/usage?tenant=%00"])
def test_what_a_database_can_not_hold_is_the_clients_error(
    tmp_path: Path, database_url: str, path: str
) -> None:
    with keyed(tmp_path / "store", database_url) as live:
        assert live.http.get(path).status_code in (400, 404)
        labelled = live.post("/v1/keys", {"tenant": "t", "names": ["*"], "label": "a\0b"})
    assert labelled.status_code == 400
    assert labelled.json()["error"]["param"] == "label"
