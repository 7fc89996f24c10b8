"""Servers on a store in a bucket: what one changes others serve, and none waits for the bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import peft  # noqa: F401  # seconds on a busy machine, which no request should wait for
import pytest
from bucket_support import file_system_of, remove_memory
from http_support import Live, live_server, make_adapter, make_turbo, wait_until, write_peft

from quickchange_store.places import index_objects

URL = "memory://servers/store"


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("QUICKCHANGE_STORE_CACHE", str(tmp_path / "cache"))
    yield
    remove_memory()


def models(live: Live) -> set[str]:
    return {model["id"] for model in live.http.get("/v1/models").json()["data"]}


def served(live: Live, name: str) -> int:
    return int(live.http.get(f"/v1/adapters/{name}").json()["current"])


def test_what_one_server_changes_another_serves_within_a_second(tmp_path: Path) -> None:
    with live_server(URL) as first, live_server(URL) as second:  # type: ignore[arg-type]
        for value in (1.0, 2.0):
            body = {"name": "sql", "path": str(write_peft(tmp_path / str(value), value))}
            assert first.post("/v1/adapters", body).status_code == 201
        made = time.monotonic()
        wait_until(lambda: "sql" in models(second) and served(second, "sql") == 2)
        assert time.monotonic() - made < 5  # 1 on a machine that is not busy
        assert first.post("/v1/adapters/sql/rollback", {}).status_code == 200
        wait_until(lambda: served(second, "sql") == 1)
        answer = second.post("/v1/completions", {"model": "sql", "prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200


def test_the_database_lies_in_a_local_folder(tmp_path: Path) -> None:
    with live_server(URL):  # type: ignore[arg-type]
        (file,) = (tmp_path / "data").rglob("quickchange.sqlite3")
    assert file.parent.name.startswith("memory-servers-store-")


def test_a_bucket_that_is_away_stops_changes_alone_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_objects, "STALE_SECONDS", 0.5)
    with live_server(URL) as live:  # type: ignore[arg-type]
        live.store.add("sql", make_adapter(1.0))
        live.store.add("fast", make_turbo(2.0, lora=True))
        wait_until(lambda: {"sql", "fast"} <= models(live))
        files = file_system_of(live.services.store)

        def away(*_arguments: object, **_options: object) -> None:
            raise ConnectionError("the network is down, says s3.internal")

        for call in ("cat_file", "find", "info", "pipe_file", "get_file", "put_file"):
            monkeypatch.setattr(files, call, away)
        body = {"name": "new", "path": str(write_peft(tmp_path / "new"))}
        refused = live.post("/v1/adapters", body)
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert "s3.internal" not in refused.text
        assert live.http.delete("/v1/adapters/sql").status_code == 503
        for name in ("sql", "fast"):
            asked = {"model": name, "prompt": "x", "max_tokens": 2}
            assert live.post("/v1/completions", asked).status_code == 200
        wait_until(lambda: "store" in live.http.get("/health").json())
        assert live.http.get("/health").status_code == 200
        assert "quickchange_store_reachable 0.0" in live.http.get("/metrics").text
        monkeypatch.undo()
        monkeypatch.setenv("QUICKCHANGE_STORE_CACHE", str(tmp_path / "cache"))
        wait_until(lambda: "store" not in live.http.get("/health").json())
        assert live.post("/v1/adapters", body).status_code == 201


def test_answers_come_at_once_while_the_bucket_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_server(URL) as live:  # type: ignore[arg-type]
        live.store.add("fast", make_turbo(2.0, lora=True))
        wait_until(lambda: "fast" in models(live))
        ended, hanging = threading.Event(), threading.Event()

        def hang(*_arguments: object, **_options: object) -> None:
            hanging.set()
            ended.wait(60)
            raise ConnectionError("no answer")

        files = file_system_of(live.services.store)
        for call in ("cat_file", "find", "info", "get_file"):
            monkeypatch.setattr(files, call, hang)
        try:
            assert hanging.wait(20)
            began = time.monotonic()
            for _ in range(5):
                asked = {"model": "fast", "prompt": "x", "max_tokens": 2}
                assert live.post("/v1/completions", asked).status_code == 200
                assert "fast" in models(live)
                assert live.http.get("/v1/adapters").status_code == 200
            assert time.monotonic() - began < 20
        finally:
            ended.set()
