"""Two servers on one store and one database answer as one server would."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from http_support import BASE, BASE_SPEC, Live, live_server, make_adapter, wait_until, write_peft

from quickchange_server.adapter_registry.merged_adapters import FOLDER, Derived
from quickchange_store.combining.merging import Recipe
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store

T = TypeVar("T")

COMPLETION = {"prompt": "Hello", "seed": 1, "max_tokens": 4}
TWO = {
    "name": "tone",
    "variants": [{"name": "a", "model": BASE}, {"name": "b", "model": "sql"}],
    "sticky": {"by": "user"},
}
SEEN_SECONDS = 1.0  # what one server changes acts on the other by then


@dataclass(frozen=True)
class Servers:
    """The two of them."""

    one: Live
    other: Live

    def __iter__(self) -> Iterator[Live]:
        return iter((self.one, self.other))

    def at_once(self, work: Callable[[Live], T]) -> list[T]:
        """What `work` returns on both, begun at the same time."""
        begun = threading.Barrier(2)

        def run(live: Live) -> T:
            begun.wait()
            return work(live)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(run, self))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("replicas")
    # Imports what adding an adapter takes, once for both servers, which share this process.
    add_adapter(Store(folder), "first", write_peft(folder / "first"), BASE_SPEC)
    with live_server(folder) as one, live_server(folder) as other:
        for index, name in enumerate(("sql", "json")):
            one.store.add(name, make_adapter(1.0 + index))
        yield Servers(one, other)


def asked(live: Live, **changes: Any) -> httpx.Response:
    return live.post("/v1/completions", {**COMPLETION, **changes})


def test_an_experiment_acts_on_the_other_server_within_a_second_for_the_same_users(
    servers: Servers,
) -> None:
    assert servers.one.post("/v1/experiments", TWO).status_code == 201
    began = time.monotonic()
    wait_until(lambda: asked(servers.other, model="tone").status_code == 200)
    assert time.monotonic() - began < SEEN_SECONDS

    def variants(live: Live) -> list[str]:
        answers = [asked(live, model="tone", user=f"user-{n}").json() for n in range(30)]
        return [answer["quickchange"]["variant"] for answer in answers]

    one, other = servers.at_once(variants)
    assert one == other
    assert set(one) == {"a", "b"}

    paused = servers.other.http.post("/v1/experiments/tone/pause")
    assert paused.status_code == 200
    wait_until(
        lambda: servers.one.http.get("/v1/experiments/tone").json()["state"] == "paused",
        SEEN_SECONDS,
    )
    assert servers.one.http.delete("/v1/experiments/tone").status_code == 200
    wait_until(lambda: asked(servers.other, model="tone").status_code == 404, SEEN_SECONDS)


def test_results_count_what_both_servers_answered(servers: Servers) -> None:
    metric = {"name": "liked", "kind": "flag"}
    made = servers.one.post("/v1/experiments", {**TWO, "name": "both", "metrics": [metric]})
    assert made.status_code == 201
    wait_until(lambda: asked(servers.other, model="both").status_code == 200, SEEN_SECONDS)
    ids = [asked(live, model="both", user=f"u{n}").json()["id"] for live in servers for n in (1, 2)]
    for live, request in zip((servers.other, servers.one), (ids[0], ids[3]), strict=True):
        outcome = {"completion": request, "name": "liked", "value": True}
        posted = live.post("/v1/experiments/both/outcomes", outcome)
        assert posted.status_code in (200, 201), posted.text
    found = [live.http.get("/v1/experiments/both/results").json() for live in servers]
    for each in found:
        each.pop("at", None)
    assert found[0] == found[1]


def test_versions_added_at_once_under_one_name_are_both_there(
    servers: Servers, tmp_path: Path
) -> None:
    folders = {live.url: write_peft(tmp_path / str(n), 10.0 + n) for n, live in enumerate(servers)}

    def add(live: Live) -> int:
        body = {"name": "twice", "path": str(folders[live.url])}
        response = live.post("/v1/adapters", body)
        assert response.status_code == 201, response.text
        version: int = response.json()["version"]
        return version

    assert sorted(servers.at_once(add)) == [1, 2]
    shown = [live.http.get("/v1/adapters/twice").json() for live in servers]
    assert [len(each["versions"]) for each in shown] == [2, 2]
    assert shown[0]["digest"] == shown[1]["digest"]


def test_a_merge_that_two_servers_make_at_once_is_one_adapter(servers: Servers) -> None:
    stores = [live.store for live in servers]
    parts = tuple((stores[0].resolve(name).digest, 1.0) for name in ("sql", "json"))
    recipe = Recipe("ties", parts, 0.5)

    async def run() -> list[str]:
        both = [Derived(store, 4) for store in stores]
        return await asyncio.gather(*(derived.digest(recipe) for derived in both))

    one, other = asyncio.run(run())
    assert one == other
    assert len(stores[0].notes(FOLDER).times()) == 1
    assert stores[1].load(one).updates
