"""Adapters that are not uploaded: by URL, fetched for a request, found in a watched folder."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_places import Places, adapter_places, files_of
from http_support import BASE, Live, live_server, wait_until, write_peft
from huggingface_hub import constants

from quickchange_server.adapter_registry import on_demand, watched_folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with adapter_places() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        for number, name in enumerate(("orders", "sql"), 1):
            folder = write_peft(tmp_path_factory.mktemp("adapters") / name, float(number))
            made.publish(f"acme/{name}", files_of(folder))
        made.publish("acme/broken", {"adapter_config.json": b"{}"})
        made.publish("evil/orders", files_of(folder))
        yield made


@pytest.fixture(autouse=True)
def _fresh(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.fails = 0
    places.asked.clear()
    monkeypatch.setattr(watched_folder, "SECONDS", 0.05)


@pytest.fixture(scope="module")
def live(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:  # noqa: ARG001
    """A server that fetches what requests name from one owner of the hub."""
    with live_server(
        tmp_path_factory.mktemp("store"),
        adapter_resolver="hf://acme/{name}",
        adapter_sources="hf://acme, s3://bucket",
    ) as made:
        yield made


def ask(live: Live, model: str, **fields: Any) -> Any:
    return live.post(
        "/v1/completions", {"model": model, "prompt": "a", "max_tokens": 2, "seed": 1, **fields}
    )


def test_an_allowed_url_is_added_and_another_is_refused_by_its_setting(live: Live) -> None:
    added = live.post("/v1/adapters", {"name": "by-url", "path": "hf://acme/orders"})
    assert added.status_code == 201, added.text
    loaded = live.post(
        "/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": "hf://acme/sql"}
    )
    assert loaded.status_code == 200, loaded.text
    for url in ("hf://evil/orders", "hf://acme-2/orders", "oci://registry/orders:v1"):
        refused = live.post("/v1/adapters", {"name": "other", "path": url})
        assert refused.status_code == 403
        assert "QUICKCHANGE_ADAPTER_SOURCES" in refused.text
    assert live.post("/v1/adapters", {"name": "x", "path": "ftp://a/b"}).status_code == 400
    missing = live.post("/v1/adapters", {"name": "x", "path": "hf://acme/none"})
    assert missing.status_code == 400
    assert "see the URL" in missing.text


def test_a_place_that_is_down_is_503_for_those_who_add(live: Live, places: Places) -> None:
    places.fails = 503
    answer = live.post("/v1/adapters", {"name": "x", "path": "hf://acme/orders"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


def test_an_adapter_is_fetched_by_the_first_request_and_once_for_all(
    live: Live, places: Places
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(live, "orders"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert sum("/api/models/acme/orders" in path for path in places.asked) == 1
    places.asked.clear()
    assert ask(live, "orders").status_code == 200
    assert not places.asked


def test_compositions_and_chats_have_theirs_fetched_too(live: Live) -> None:
    composed = ask(live, BASE, adapters=[{"id": "sql", "weight": 0.5}])
    assert composed.status_code == 200, composed.text
    assert "sql" in live.store.names()


def test_a_name_that_is_nowhere_costs_one_look(live: Live, places: Places) -> None:
    for _ in range(5):
        answer = ask(live, "nowhere")
        assert answer.status_code == 404
        assert "no model 'nowhere'" in answer.text
    assert sum("nowhere" in path for path in places.asked) == 1


@pytest.mark.parametrize("name", [BASE, "off", "a/../b", "x" * 300, "a@1@2", "é", "dummy"])
def test_what_is_no_adapters_name_is_not_looked_for(live: Live, places: Places, name: str) -> None:
    ask(live, name)
    assert not places.asked


def test_an_adapter_that_can_not_be_served_says_why(live: Live) -> None:
    for _ in range(2):
        answer = ask(live, "broken")
        assert answer.status_code == 424
        assert "can't be served" in answer.text
    assert ask(live, BASE).status_code == 200


def test_a_place_that_is_down_is_503_for_requests(live: Live, places: Places) -> None:
    places.fails = 500
    answer = ask(live, "later")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


def test_who_leaves_does_not_end_the_fetch_for_others(live: Live, places: Places) -> None:
    entered, go = threading.Event(), threading.Event()
    answer = places.answer

    def slowly(path: str) -> Any:
        if "slow" in path:
            entered.set()
            go.wait(20)
        return answer(path)

    places.publish("acme/slow", places.repositories["acme/sql", "main"])
    places.answer = slowly  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(2) as pool:
            left = pool.submit(
                lambda: live.http.post(
                    "/v1/completions", json={"model": "slow", "prompt": "a"}, timeout=0.5
                )
            )
            assert entered.wait(20)
            stays = pool.submit(ask, live, "slow")
            assert left.exception() is not None
            assert ask(live, BASE).status_code == 200  # meanwhile
            go.set()
            assert stays.result().status_code == 200
    finally:
        go.set()
        places.answer = answer  # type: ignore[method-assign]


def test_no_more_is_fetched_than_the_setting_says(tmp_path: Path) -> None:
    with live_server(
        tmp_path, adapter_resolver="hf://acme/{name}", adapter_resolver_names=1
    ) as live:
        assert ask(live, "orders").status_code == 200
        assert ask(live, "sql").status_code == 404


def test_requests_wait_in_bounded_number(
    live: Live, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "MOST_WAITED_FOR", 0)
    assert ask(live, "one-more").status_code == 503
    assert not places.asked


def test_a_pattern_may_be_a_folder(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapters" / "mine")
    with live_server(tmp_path / "s", adapter_resolver=f"{tmp_path}/adapters/{{name}}") as live:
        assert ask(live, "mine").status_code == 200
        assert ask(live, "other").status_code == 404


def test_a_watched_folder_is_published_and_what_was_rolled_back_stays_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "watched"
    write_peft(folder / "first", 1.0)
    (folder / "half").mkdir()
    (folder / "half" / "adapter_config.json").write_text("{}")
    (folder / ".hidden").mkdir()
    with caplog.at_level(logging.WARNING), live_server(tmp_path / "s", adapter_watch=folder) as it:
        wait_until(lambda: "first" in it.store.names())
        wait_until(lambda: "'half' is not published" in caplog.text)
        shutil.rmtree(folder / "first")
        write_peft(folder / "first", 2.0)
        wait_until(lambda: len(it.store.versions("first")) == 2)
        assert ask(it, "first").status_code == 200
        it.store.rollback("first")
        shutil.rmtree(folder / "half")
        write_peft(folder / "half", 3.0)
        wait_until(lambda: "half" in it.store.names())
        assert it.store.resolve("first").version == 1
    with live_server(tmp_path / "s", adapter_watch=folder) as it:  # a restart reads all again
        write_peft(folder / "last", 4.0)
        wait_until(lambda: "last" in it.store.names())
        assert it.store.resolve("first").version == 1
        assert len(it.store.versions("first")) == 2


def test_a_watched_folder_that_is_not_there_harms_nothing(tmp_path: Path) -> None:
    with live_server(tmp_path / "s", adapter_watch=tmp_path / "later") as live:
        assert ask(live, BASE).status_code == 200
        write_peft(tmp_path / "later" / "new", 1.0)
        wait_until(lambda: "new" in live.store.names())
