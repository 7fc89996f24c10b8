"""`merged_adapters` by ties and DARE: derived once, beside decoding, and kept within bounds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, expected_text, live_server, make_adapter, wait_until
from keys_support import client_of, created, keyed_server

from quickchange_server.adapter_registry.merged_adapters import FOLDER, IN_USE_SECONDS, Derived
from quickchange_server.errors import RequestFailedError, UnavailableError
from quickchange_server.protocol import Component
from quickchange_store.combining.merging import MergeStrategy, Recipe, derive, merge
from quickchange_store.errors import AdapterNotFoundError, UnsupportedFeatureError
from quickchange_store.store import Store

MERGED = {"ids": ["sql", "json"], "weights": [0.5, 2.0], "density": 0.5}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    filled(tmp_path)
    with live_server(tmp_path) as live:
        yield live


def filled(folder: Path) -> Store:
    store = Store(folder)
    for value, name in enumerate(["sql", "json", "math"], 1):
        store.add(name, make_adapter(float(value)))
    return store


def generate(live: Live, **merged: Any) -> Any:
    parameters = {"seed": 3, "max_new_tokens": 6, "merged_adapters": {**MERGED, **merged}}
    response = live.post("/generate", {"inputs": "Hello", "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


def recipe(store: Store, strategy: MergeStrategy = "ties", density: float = 0.5) -> Recipe:
    parts = {"sql": 0.5, "json": 2.0}
    named = tuple((store.resolve(name).digest, weight) for name, weight in parts.items())
    return Recipe(strategy, named, density)


def derived_files(store: Store) -> list[Path]:
    return sorted((Path(store.location) / FOLDER).glob("*.digests"))


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_a_merge_is_served_as_an_adapter_of_its_own(live: Live, strategy: MergeStrategy) -> None:
    text = generate(live, merge_strategy=strategy)
    key = derive(live.store, recipe(live.store, strategy))
    assert text == expected_text(3, 5, 6, Component(key))


def test_derived_adapters_are_listed_nowhere(live: Live) -> None:
    generate(live, merge_strategy="ties")
    names = {"sql", "json", "math"}
    models = {model["id"] for model in live.http.get("/v1/models").json()["data"]}
    assert models == {BASE, *names, *(f"{name}@1" for name in names)}
    assert {a["id"] for a in live.http.get("/v1/adapters").json()["data"]} == names


def test_one_adapter_alone_is_served_at_its_weight_as_in_peft(live: Live) -> None:
    text = generate(live, ids=["sql"], weights=[0.5], merge_strategy="ties")
    assert text == expected_text(3, 5, 6, Component(live.store.resolve("sql").digest, 0.5))
    assert derived_files(live.store) == []


def test_requests_at_once_share_one_making_and_later_ones_make_nothing(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="quickchange_server.adapter_registry.merged_adapters")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: generate(live, merge_strategy="ties"), range(4)))
    texts.append(generate(live, merge_strategy="ties"))
    assert len(set(texts)) == 1
    assert caplog.text.count("derived ") == 1


def test_streams_go_on_while_an_adapter_is_made(live: Live) -> None:
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(generate, live, merge_strategy="ties")
        done = 0
        while not merging.done():
            generate(live, merge_strategy="linear")
            done += 1
    assert done > 5


def test_a_restart_finds_what_was_made_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="quickchange_server.adapter_registry.merged_adapters")
    filled(tmp_path)
    texts = []
    for _ in range(2):
        with live_server(tmp_path) as live:
            texts.append(generate(live, merge_strategy="ties"))
    assert texts[0] == texts[1]
    assert caplog.text.count("derived ") == 1


def test_a_refusal_of_the_maker_is_the_clients_error(tmp_path: Path) -> None:
    store = filled(tmp_path)
    broken = Recipe("ties", (("0" * 64, 1.0), (store.resolve("sql").digest, 1.0)), 0.5)
    with pytest.raises(UnsupportedFeatureError, match="no such version"):
        asyncio.run(Derived(store, 2).digest(broken))


# --- within bounds ------------------------------------------------------------------------------


def make_all(store: Store, limit: int, recipes: list[Recipe], idle: float) -> list[str]:
    """Each recipe made by a server of its own, those before it unused for `idle` seconds."""
    made = []
    for wanted in recipes:
        made.append(asyncio.run(Derived(store, limit).digest(wanted)))
        versions = [store.path(digest).parent for digest in made if held(store, digest)]
        for path in (*derived_files(store), *versions):
            past = path.stat().st_mtime - idle
            os.utime(path, (past, past))
    return made


def held(store: Store, digest: str) -> bool:
    try:
        store.path(digest)
    except AdapterNotFoundError:
        return False
    return True


@pytest.mark.parametrize(("idle", "kept"), [(2 * IN_USE_SECONDS, 2), (0.0, 3)])
def test_over_the_limit_the_one_unused_longest_goes_unless_it_may_be_in_use(
    tmp_path: Path, idle: float, kept: int
) -> None:
    store = filled(tmp_path)
    recipes = [recipe(store, "dare_linear", density) for density in (0.3, 0.5, 0.7)]
    made = make_all(store, 2, recipes, idle)
    assert len(set(made)) == 3
    assert [held(store, digest) for digest in made] == [kept == 3, True, True]
    assert len(derived_files(store)) == kept


def test_what_another_server_has_just_taken_up_stays(tmp_path: Path) -> None:
    store = filled(tmp_path)
    recipes = [recipe(store, "dare_linear", density) for density in (0.3, 0.5)]
    (first,) = make_all(store, 1, recipes[:1], 2 * IN_USE_SECONDS)
    assert store.keep(first)
    make_all(store, 1, recipes[1:], 0.0)
    assert held(store, first)


def test_what_was_merged_of_a_removed_adapter_goes_with_the_next_making(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (first,) = make_all(store, 8, [recipe(store)], 2 * IN_USE_SECONDS)
    store.remove("sql")
    others = tuple((store.resolve(name).digest, 1.0) for name in ("json", "math"))
    (second,) = make_all(store, 8, [Recipe("ties", others, 0.5)], 0.0)
    assert not held(store, first)
    assert held(store, second)


def test_what_gc_took_is_made_again(tmp_path: Path) -> None:
    store = filled(tmp_path)
    wanted = recipe(store)
    digest = asyncio.run(Derived(store, 8).digest(wanted))
    assert store.gc(min_age=-1).versions == (digest,)
    assert asyncio.run(Derived(store, 8).digest(wanted)) == digest
    assert held(store, digest)


def test_use_keeps_a_derived_adapter_from_gc(tmp_path: Path) -> None:
    store = filled(tmp_path)
    wanted = recipe(store)
    digest = asyncio.run(Derived(store, 8).digest(wanted))
    past = time.time() - 5000
    os.utime(store.path(digest).parent, (past, past))
    asyncio.run(Derived(store, 8).digest(wanted))
    assert store.gc(min_age=3600).versions == ()


# --- for whom ------------------------------------------------------------------------------------


MERGE = {
    "inputs": "Hello",
    "parameters": {"max_new_tokens": 4, "merged_adapters": {**MERGED, "merge_strategy": "ties"}},
}


def test_a_keys_limits_refuse_before_anything_is_made(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with keyed_server(tmp_path) as live:
        _, secret = created(live, limits={"requests_per_minute": 1})
        with client_of(live, secret) as client:
            client.post("/generate", json={"inputs": "x"}).raise_for_status()
            assert client.post("/generate", json=MERGE).status_code == 429
    assert derived_files(store) == []


def test_a_full_queue_refuses_before_anything_is_made(tmp_path: Path) -> None:
    store = filled(tmp_path)
    long = {"inputs": "x", "parameters": {"max_new_tokens": 500}}
    with (
        live_server(tmp_path, Behaviour(step_seconds=0.05), max_queue=1) as live,
        live.http.stream("POST", "/generate_stream", json=long) as running,
    ):
        lines = running.iter_lines()  # kept: its end would close the stream
        next(lines)
        assert live.post("/generate", MERGE).status_code == 429
    assert derived_files(store) == []


def test_a_client_that_goes_away_waits_for_no_merge(tmp_path: Path) -> None:
    filled(tmp_path)
    with keyed_server(tmp_path) as live:
        _, secret = created(live, limits={"concurrent_requests": 1})
        with client_of(live, secret) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json=MERGE, timeout=0.1)
            again = partial(client.post, "/generate", json={"inputs": "x"})
            wait_until(lambda: again().status_code == 200)


def test_what_has_begun_is_made_and_what_waits_is_not_where_all_have_gone(tmp_path: Path) -> None:
    store = filled(tmp_path)
    first, second = recipe(store), recipe(store, "dare_ties")

    async def leave() -> Derived:
        derived = Derived(store, 8)
        asked = [asyncio.create_task(derived.digest(first))]
        while derived._under_way is None:
            await asyncio.sleep(0.01)
        asked.append(asyncio.create_task(derived.digest(second)))
        await asyncio.sleep(0.1)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert await derived.digest(first)  # joins, or finds it made
        await asyncio.sleep(0.5)
        return derived

    asyncio.run(leave())
    assert [path.stem for path in derived_files(store)] == [first.key]


def test_one_who_stays_keeps_a_waiting_merge(tmp_path: Path) -> None:
    store = filled(tmp_path)

    async def ask() -> str:
        derived = Derived(store, 8)
        first = asyncio.create_task(derived.digest(recipe(store)))
        gone, stays = (
            asyncio.create_task(derived.digest(recipe(store, "dare_ties"))) for _ in range(2)
        )
        await asyncio.sleep(0.1)
        gone.cancel()
        await first
        return await stays

    assert held(store, asyncio.run(ask()))


def test_a_merge_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    store = filled(tmp_path)

    async def ask() -> None:
        await Derived(store, 8, making_seconds=0.05).digest(recipe(store))

    with pytest.raises(RequestFailedError, match="more than 0 s"):
        asyncio.run(ask())
    assert derived_files(store) == []


def test_the_servers_end_tells_those_who_wait(tmp_path: Path) -> None:
    store = filled(tmp_path)

    async def ask() -> None:
        derived = Derived(store, 8)
        waiting = asyncio.create_task(derived.digest(recipe(store)))
        await asyncio.sleep(0.1)
        await derived.close()
        await waiting

    with pytest.raises(UnavailableError, match="shutting down"):
        asyncio.run(ask())


def test_the_making_equals_merge_in_this_process(tmp_path: Path) -> None:
    store = filled(tmp_path)
    wanted = recipe(store, "dare_ties")
    digest = asyncio.run(Derived(store, 8).digest(wanted))
    merged = merge(wanted, [store.load(component) for component, _ in wanted.components])
    assert store.publish(merged) == digest
