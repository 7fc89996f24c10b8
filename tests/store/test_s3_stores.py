"""Stores on an S3 server: several machines at once, services that are away, uploads in parts."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bucket_support import file_system_of, s3_server

from quickchange_store.errors import (
    AdapterNotFoundError,
    NameConflictError,
    StoreLocationError,
    StoreUnavailableError,
)
from quickchange_store.places import index_objects
from quickchange_store.places.objects import Objects
from quickchange_store.store import Store

pytest.importorskip("moto")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service runs in this process, on a machine that may be busy."""
    monkeypatch.setattr(Objects, "call_seconds", 60.0)


@pytest.fixture
def url(service: str) -> str:  # noqa: ARG001
    return f"s3://adapters/{uuid.uuid4().hex[:8]}"


def tensor(store: Store, reference: str) -> float:
    adapter = store.load(store.resolve(reference).digest)
    return float(adapter.updates["model.layers.0.q_proj"].a[0, 0])


def test_a_store_on_s3_does_what_a_folder_does(
    url: str, tmp_path: Path, small_adapter: Any, turbo_adapter: Any
) -> None:
    store = Store(url, tmp_path / "one")
    assert not store.exists
    first = store.add("team/a", small_adapter(1))
    store.add("team/a", small_adapter(2))
    store.add("fast", turbo_adapter(3))
    store.alias("prod", "team/a", turbo="fast")
    assert store.rollback("team/a") == first
    elsewhere = Store(f"{url}/", tmp_path / "two")
    assert elsewhere.names() == ("fast", "team/a")
    assert (tensor(elsewhere, "prod"), tensor(elsewhere, "team/a@2")) == (1, 2)
    assert elsewhere.resolve("prod").turbo == elsewhere.resolve("fast").digest
    with pytest.raises(NameConflictError):
        elsewhere.remove("team/a")
    store.unalias("prod")
    (gone,) = store.remove("team/a@2")
    assert store.gc(min_age=60).waiting.versions == 1
    assert store.gc(min_age=-2).versions == (gone.digest,)  # S3's times are whole seconds
    assert store.verify() == []
    assert Store.at(url).exists


def test_a_change_is_seen_elsewhere_within_a_second(
    url: str, tmp_path: Path, small_adapter: Any
) -> None:
    here, there = Store(url, tmp_path / "one"), Store(url, tmp_path / "two")
    here.add("a", small_adapter(0))
    assert there.resolve("a").version == 1
    times = []
    for value in range(1, 6):
        here.add("a", small_adapter(value))
        made = time.monotonic()
        while there.resolve("a").version != value + 1:
            assert time.monotonic() - made < 60
            time.sleep(0.005)
        times.append(time.monotonic() - made)
    assert sorted(times)[2] < 1.0  # the median: this machine may be busy


WRITER = """
import sys, torch
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.store import Store
url, cache, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(url, cache)
for value in range(first, first + 3):
    update = LowRankUpdate(torch.full((2, 4), float(value)), torch.ones(3, 2), 1.0)
    adapter = CanonicalAdapter("L", "tiny", {"model.layers.0.q_proj": update})
    store.add("shared", adapter)
    store.add(f"own/{first}", adapter)
    store.alias(f"alias-{first}", f"own/{first}")
"""


def test_writers_in_processes_of_their_own_lose_nothing(url: str, tmp_path: Path) -> None:
    firsts = (0, 1)  # two contents are equal
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, str(tmp_path / str(f)), str(f)])
        for f in firsts
    ]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    store = Store(url, tmp_path / "reader")
    assert len(store.versions("shared")) == 4
    assert [len(store.versions(f"own/{first}")) for first in firsts] == [3, 3]
    assert set(store.aliases()) == {f"alias-{first}" for first in firsts}
    assert store.verify() == []


def test_random_writers_and_collectors_lose_nothing_and_readers_see_whole_states(
    url: str, tmp_path: Path, small_adapter: Any
) -> None:
    begun, errors = threading.Event(), []
    added: list[tuple[str, int, float]] = []

    def work(number: int) -> None:
        chance, store = random.Random(number), Store(url, tmp_path / f"w{number}")
        for turn in range(4):
            name, value = f"n{chance.randrange(2)}", 10 * number + turn
            added.append((name, store.add(name, small_adapter(value)).number, value))
            try:
                chance.choice(
                    [
                        partial(store.alias, "prod", name),
                        partial(store.rollback, name),
                        partial(store.gc, -2),
                        partial(store.unalias, "prod"),
                    ]
                )()
            except AdapterNotFoundError:  # no alias, or no version before: another was quicker
                continue

    def caught(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        store = Store(url, tmp_path / "reader")
        while not begun.wait(0.02):
            index = store.snapshot()
            for alias in index.aliases.values():
                assert alias.name in index.entries

    writers = [
        threading.Thread(target=caught, args=(partial(work, number),)) for number in range(3)
    ]
    reader = threading.Thread(target=caught, args=(read,))
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(300)
    begun.set()
    reader.join(20)
    assert errors == []
    store = Store(url, tmp_path / "end")
    numbers = {(name, number) for name, number, _ in added}
    assert len(numbers) == len(added)  # no two adds were given one number
    assert {(v.name, v.number) for n in store.names() for v in store.versions(n)} == numbers
    assert all(tensor(store, f"{name}@{number}") == value for name, number, value in added)
    assert store.verify() == []


def test_uploads_in_parts_that_came_to_no_end_are_removed(
    url: str, tmp_path: Path, small_adapter: Any
) -> None:
    store, other = Store(url, tmp_path), Store(f"{url}-other", tmp_path)
    store.add("a", small_adapter(1))
    for place in (store, other):
        key = f"{place.location.removeprefix('s3://adapters/')}/versions/ab/abc/0/adapter"
        file_system_of(place).call_s3("create_multipart_upload", Bucket="adapters", Key=key)
    assert store.gc(min_age=60).temporaries == 1  # by the service, all began years ago
    (left,) = file_system_of(store).list_multipart_uploads("adapters")
    assert left["Key"].startswith(other.location.removeprefix("s3://adapters/"))


def test_a_bucket_that_is_not_there_is_named(service: str, tmp_path: Path) -> None:  # noqa: ARG001
    with pytest.raises(StoreLocationError, match=r"s3://nothing/x: there is no such bucket"):
        Store("s3://nothing/x", tmp_path).names()


def test_a_service_that_does_not_answer_is_an_error_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_adapter: Any
) -> None:
    monkeypatch.setattr(index_objects, "STALE_SECONDS", 0.5)
    with s3_server() as url:
        store = Store("s3://adapters/x", tmp_path)
        store.add("a", small_adapter(1))
        store.snapshot()
        monkeypatch.setattr(Objects, "call_seconds", 1.0)
        time.sleep(0.5)  # looks that began before have ended
    port = int(url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):  # takes connections and never answers
        time.sleep(1.0)
        began = time.monotonic()
        assert store.resolve("a").version == 1
        assert time.monotonic() - began < 0.2
        with pytest.raises(StoreUnavailableError):
            store.alias("prod", "a")
        assert time.monotonic() - began < 30
        assert store.trouble is not None
