"""A bucket that fails, waits or is damaged, and machines that die: old state or new, never half."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bucket_support import look, remove_memory, store_on
from fsspec.implementations.memory import MemoryFileSystem

from quickchange_store.errors import (
    AdapterNotFoundError,
    CorruptStoreError,
    CorruptVersionError,
    StoreLocationError,
    StoreUnavailableError,
)
from quickchange_store.places import index_objects
from quickchange_store.places.objects import Objects
from quickchange_store.store import Store

ROOT = "faults/store"


class Bucket:
    """The memory's file system, with a step of a test's own before and after any call."""

    async_impl = False

    def __init__(self) -> None:
        self._files = MemoryFileSystem()
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda _call, _path: None
        self.after: Callable[[str, str], None] = lambda _call, _path: None

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._files, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = next(a for a in arguments if isinstance(a, str) and ROOT in a)
            self.calls.append((name, path))
            self.before(name, path)
            result = function(*arguments, **options)
            self.after(name, path)
            return result

        return call

    def failing(self, when: str, call: str, part: str, error: Exception, times: int = 1) -> None:
        """Let calls of a name on paths with a part fail, so many times."""
        left = [times]

        def fail(name: str, path: str) -> None:
            if name == call and part in path and left[0]:
                left[0] -= 1
                raise error

        setattr(self, when, fail)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    yield Bucket()
    remove_memory()


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> Store:
    return store_on(bucket, ROOT, tmp_path / "cache")


@pytest.fixture
def other(bucket: Bucket, tmp_path: Path) -> Store:
    """The same store on another machine."""
    return store_on(bucket, ROOT, tmp_path / "other")


def tensor(store: Store, name: str) -> float:
    adapter = store.load(store.resolve(name).digest)
    return float(adapter.updates["model.layers.0.q_proj"].a[0, 0])


AWAY = ConnectionError("the network is down")


# --- crashes and lost answers ---------------------------------------------------------------------


@pytest.mark.parametrize("part", ["adapter.safetensors", "info.json", "index/"])
def test_a_writer_that_dies_at_any_step_leaves_the_old_state(
    part: str, bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))
    call = "pipe_file" if part == "index/" else "put_file"
    bucket.failing("before", call, part, AWAY, times=99)
    with pytest.raises(StoreUnavailableError):
        store.add("a", small_adapter(2))
    bucket.before = lambda _call, _path: None
    look(store, other)
    for reader in (store, other):
        assert [version.number for version in reader.versions("a")] == [1]
        assert reader.verify() == []
    other.gc(min_age=0)
    assert store.add("a", small_adapter(2)).number == 2
    look(other)
    assert tensor(other, "a") == 2
    assert other.verify() == []


def test_a_change_whose_answer_is_lost_is_made_once(
    bucket: Bucket, store: Store, small_adapter: Any
) -> None:
    for value in (1, 2, 3):
        store.add("a", small_adapter(value))
    bucket.failing("after", "pipe_file", "index/", AWAY)
    assert store.rollback("a").number == 2  # twice would be 1
    assert store.resolve("a").version == 2


def test_a_writer_that_was_not_first_makes_its_change_on_what_is_newest(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))
    pending = [lambda: other.add("b", small_adapter(2)), lambda: other.alias("prod", "a")]

    def others_first(name: str, path: str) -> None:
        if name == "pipe_file" and "index/" in path and pending:
            pending.pop()()

    bucket.before = others_first
    assert store.add("a", small_adapter(3)).number == 2
    assert store.names() == ("a", "b")
    assert set(store.aliases()) == {"prod"}
    assert store.verify() == []


@pytest.mark.parametrize("again", [False, True], ids=["new content", "removed content"])
def test_a_collection_between_upload_and_commit_takes_nothing_that_is_then_named(
    again: bool, bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("keep", small_adapter(9))
    if again:
        store.add("a", small_adapter(1))
        store.remove("a")
    collected = []

    def collect_first(name: str, path: str) -> None:
        if name == "pipe_file" and "index/" in path and not collected:
            collected.append(0)
            collected.append(other.gc(min_age=0))

    bucket.before = collect_first
    digest = store.add("a", small_adapter(1)).digest
    assert collected[1].versions == (digest,)  # it was there, and named by nobody
    look(other)
    assert tensor(other, "a") == 1
    assert store.verify() == []


def test_a_collector_that_was_asleep_removes_nothing_that_is_named_by_now(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("keep", small_adapter(9))
    store.add("a", small_adapter(1))
    store.remove("a")
    added = []

    def add_before_it_removes(name: str, path: str) -> None:
        if name == "rm_file" and "versions/" in path and not added:
            added.append(0)
            added.append(store.add("a", small_adapter(1)))

    bucket.before = add_before_it_removes
    other.gc(min_age=0)
    assert len(added) == 2
    look(other)
    assert tensor(other, "a") == 1
    assert other.verify() == []


# --- what can't be written by several -------------------------------------------------------------


def test_a_service_that_overwrites_what_was_to_be_created_is_refused(
    tmp_path: Path, small_adapter: Any
) -> None:
    class Overwriting(MemoryFileSystem):
        def pipe_file(self, path: str, value: bytes, mode: str = "", **options: Any) -> None:  # noqa: ARG002
            super().pipe_file(path, value, mode="overwrite", **options)

    store = store_on(Overwriting(), ROOT, tmp_path)
    with pytest.raises(StoreLocationError, match="conditional writes"):
        store.add("a", small_adapter(1))
    assert MemoryFileSystem().find(f"/{ROOT}/index") == []
    assert MemoryFileSystem().find(f"/{ROOT}/versions") == []
    remove_memory()


def test_a_writer_behind_a_removed_index_says_that_its_change_may_be_lost(
    bucket: Bucket, store: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))

    def sleep_for_hours(name: str, path: str) -> None:
        if name == "pipe_file" and "index/" in path:
            bucket._files.rm(f"/{ROOT}/index/000000000002.json")

    bucket.before = sleep_for_hours
    with pytest.raises(StoreUnavailableError, match="see whether it was made"):
        store.alias("prod", "a")


# --- readers --------------------------------------------------------------------------------------


def test_a_look_at_an_unchanged_index_is_one_call(
    bucket: Bucket, store: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))
    store.snapshot()
    bucket.calls.clear()
    look(store)
    assert [name for name, _ in bucket.calls] == ["cat_file"]


def test_readers_are_answered_at_once_while_the_bucket_hangs(
    bucket: Bucket, store: Store, small_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_objects, "STALE_SECONDS", 0.5)
    store.add("a", small_adapter(1))
    store.snapshot()
    ends = threading.Event()
    bucket.before = lambda _call, _path: (ends.wait(30), None)[1]
    try:
        time.sleep(1.0)  # the looking thread hangs by now
        began = time.perf_counter()
        for _ in range(100):
            assert store.resolve("a").version == 1
        assert time.perf_counter() - began < 20  # of the 30 that each call to the bucket takes
        assert store.trouble is not None
        assert "seconds ago" in store.trouble
    finally:
        ends.set()
    bucket.before = lambda _call, _path: None
    look(store)
    assert store.trouble is None


def test_names_go_on_while_the_bucket_is_away_and_changes_say_so(
    bucket: Bucket,
    store: Store,
    small_adapter: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_objects, "STALE_SECONDS", 0.0)
    store.add("a", small_adapter(1))
    store.snapshot()

    def away(_call: str, _path: str) -> None:
        raise AWAY

    bucket.before = away
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            look(store)
    told = [line for line in caplog.messages if "can't be read" in line]
    assert len(told) == 1
    assert "the network is down" in told[0]
    assert tensor(store, "a") == 1
    assert store.trouble is not None
    for change in (lambda: store.alias("prod", "a"), lambda: store.add("b", small_adapter(2))):
        with pytest.raises(StoreUnavailableError, match="network is down"):
            change()
    bucket.before = lambda _call, _path: None
    store.alias("prod", "a")
    assert store.resolve("prod").version == 1


def test_a_bucket_that_is_away_from_the_start_is_an_error(bucket: Bucket, store: Store) -> None:
    bucket.failing("before", "find", "index", AWAY, times=9)
    with pytest.raises(StoreUnavailableError, match="network is down"):
        store.names()


def test_a_reader_that_lags_behind_removed_indexes_comes_forward(
    bucket: Bucket,
    store: Store,
    other: Store,
    small_adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.add("a", small_adapter(1))
    assert other.names() == ("a",)
    monkeypatch.setattr(index_objects, "LOOK_SECONDS", 60.0)
    time.sleep(0.4)
    for value in range(2, 6):
        store.add("a", small_adapter(value))
        bucket._files.rm(f"/{ROOT}/index/{value:012d}.json")
    look(other)
    assert other.resolve("a").version == 1
    monkeypatch.setattr(index_objects, "LIST_SECONDS", 0.0)
    look(other)
    assert other.resolve("a").version == 5


def test_replaced_indexes_are_removed_after_their_time(
    store: Store, other: Store, small_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in range(1, 6):
        store.add("a", small_adapter(value))
    before = len(MemoryFileSystem().find(f"/{ROOT}/index"))
    store.gc(min_age=0)
    assert len(MemoryFileSystem().find(f"/{ROOT}/index")) == before + 1
    monkeypatch.setattr(index_objects, "KEPT_SECONDS", 0.0)
    store.gc(min_age=0)
    assert len(MemoryFileSystem().find(f"/{ROOT}/index")) == 1
    assert other.resolve("a").version == 5


def test_a_damaged_index_is_named_and_the_last_good_one_goes_on(
    store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))
    store.snapshot()
    MemoryFileSystem().pipe_file(f"/{ROOT}/index/000000000003.json", b'{"epoch": 1, "index": {}}')
    look(store)
    assert store.names() == ("a",)
    with pytest.raises(CorruptStoreError, match=r"index/000000000003\.json"):
        other.names()
    with pytest.raises(CorruptStoreError, match=r"index/000000000003\.json"):
        store.alias("prod", "a")
    assert len(other.verify()) == 1


def test_a_turbos_figures_are_at_hand_while_the_bucket_hangs(
    bucket: Bucket, store: Store, other: Store, turbo_adapter: Any
) -> None:
    digest = store.add("fast", turbo_adapter(1)).digest
    assert other.names() == ("fast",)

    def away(_call: str, _path: str) -> None:
        raise AWAY

    bucket.before = away
    assert other.info(digest).turbo is not None


# --- versions -------------------------------------------------------------------------------------


def downloads(bucket: Bucket) -> list[str]:
    return [path.rpartition("/")[2] for name, path in bucket.calls if name == "get_file"]


def test_figures_need_no_download_of_tensors(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    bucket.calls.clear()
    assert other.info(digest).max_rank == 2
    assert other.info(digest).max_rank == 2
    assert downloads(bucket) == ["info.json"]


def test_a_version_is_fetched_once_and_not_at_all_where_it_was_added(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    store.add("a", small_adapter(1))
    bucket.calls.clear()
    assert tensor(store, "a") == 1
    assert downloads(bucket) == []
    assert [tensor(other, "a") for _ in range(3)] == [1, 1, 1]
    assert sorted(downloads(bucket)) == ["adapter.safetensors", "info.json"]


def test_all_who_wait_for_a_version_share_one_download(
    bucket: Bucket, store: Store, tmp_path: Path, small_adapter: Any
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    bucket.calls.clear()
    bucket.before = lambda call, _path: time.sleep(0.1) if call == "get_file" else None
    readers = [store_on(bucket, ROOT, tmp_path / "shared") for _ in range(4)]
    threads = [threading.Thread(target=reader.load, args=(digest,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert downloads(bucket).count("adapter.safetensors") == 1


def spoiled(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_version_that_is_damaged_in_the_cache_is_fetched_again(
    store: Store, other: Store, small_adapter: Any
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    path = other.path(digest)
    path.write_bytes(spoiled(path.read_bytes()))
    assert tensor(other, "a") == 1
    assert other.path(digest).read_bytes() == store.path(digest).read_bytes()


def test_figures_that_are_damaged_in_the_cache_are_fetched_again(
    store: Store, other: Store, small_adapter: Any, tmp_path: Path
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    info = other.info(digest)
    (cached,) = (tmp_path / "other").glob("??/*.json")
    cached.write_bytes(spoiled(cached.read_bytes()))
    assert other.info(digest) == info


def test_a_version_that_arrives_damaged_is_fetched_once_more(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    path = store.address(digest).removeprefix("memory:/")
    whole = MemoryFileSystem().cat_file(path)
    MemoryFileSystem().pipe_file(path, spoiled(whole))

    def heal(name: str, fetched: str) -> None:
        if name == "get_file" and "adapter" in fetched:
            MemoryFileSystem().pipe_file(path, whole)

    bucket.after = heal
    bucket.calls.clear()
    assert tensor(other, "a") == 1
    assert downloads(bucket).count("adapter.safetensors") == 2


def test_a_version_that_is_damaged_where_it_is_kept_is_never_served_nor_cached(
    bucket: Bucket, store: Store, other: Store, small_adapter: Any, tmp_path: Path
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    path = store.address(digest).removeprefix("memory:/")
    MemoryFileSystem().pipe_file(path, spoiled(MemoryFileSystem().cat_file(path)))
    bucket.calls.clear()
    with pytest.raises(CorruptVersionError, match="memory://"):
        other.load(digest)
    assert downloads(bucket).count("adapter.safetensors") == 2
    assert list((tmp_path / "other").glob("??/*.safetensors")) == []
    store.add("a", small_adapter(1))  # repairs it
    assert tensor(other, "a") == 1


def test_a_version_that_is_gone_is_not_found(
    store: Store, other: Store, small_adapter: Any
) -> None:
    digest = store.add("a", small_adapter(1)).digest
    store.remove("a")
    store.gc(min_age=0)
    with pytest.raises(AdapterNotFoundError):
        other.load(digest)


def test_two_stores_share_a_cache_and_keep_their_own_figures(
    bucket: Bucket, tmp_path: Path, small_adapter: Any
) -> None:
    import dataclasses

    first = store_on(bucket, ROOT, tmp_path)
    second = store_on(bucket, f"{ROOT}-two", tmp_path)
    named = dataclasses.replace(small_adapter(1), source={"from": "second"})
    digest = first.add("a", small_adapter(1)).digest
    assert second.add("a", named).digest == digest
    assert (first.info(digest).source, second.info(digest).source) == ({}, {"from": "second"})


def test_gc_keeps_what_is_young_and_says_until_when(store: Store, small_adapter: Any) -> None:
    kept = store.add("a", small_adapter(1))
    gone = store.add("b", small_adapter(2))
    store.remove("b")
    waiting = store.gc(min_age=60).waiting
    assert (waiting.versions, waiting.bytes > 0) == (1, True)
    assert waiting.until is not None
    assert 50 < waiting.until - time.time() < 61
    assert store.gc(min_age=0).versions == (gone.digest,)
    assert store.gc(min_age=0).waiting.versions == 0
    assert store.load(kept.digest)
    assert MemoryFileSystem().find(f"/{ROOT}/kept") == []


def test_only_old_uploads_of_the_store_itself_are_ended() -> None:
    now = datetime.now(UTC)
    uploads = [
        {"Key": f"{key}/adapter", "UploadId": f"{key} {age}", "Initiated": now - timedelta(0, age)}
        for key in ("store", "store-two", "other")
        for age in (0, 100)
    ]
    ended = []

    class Service(MemoryFileSystem):
        def list_multipart_uploads(self, bucket: str) -> list[dict[str, Any]]:
            assert bucket == "faults"
            return uploads

        def call_s3(self, method: str, **named: str) -> None:
            ended.append((method, named["UploadId"]))

    served = Objects(Service(), ROOT, "s3://faults/store")
    assert served.abort_uploads(now.timestamp() - 50) == 1
    assert ended == [("abort_multipart_upload", "store 100")]


def test_keeping_restarts_a_versions_time(store: Store, small_adapter: Any) -> None:
    kept, left = store.publish(small_adapter(1)), store.publish(small_adapter(2))
    time.sleep(0.6)
    assert store.keep(kept)
    assert store.gc(min_age=0.5).versions == (left,)
    assert not store.keep(left)
    store.discard(kept)
    with pytest.raises(AdapterNotFoundError):
        store.address(kept)


def test_discarding_leaves_what_was_kept_lately(store: Store, small_adapter: Any) -> None:
    digest = store.publish(small_adapter(1))
    time.sleep(0.6)
    assert store.keep(digest)
    store.discard(digest, 0.5)
    assert store.keep(digest)
    time.sleep(0.6)
    store.discard(digest, 0.5)
    assert not store.keep(digest)


def test_discarding_leaves_what_a_name_refers_to(store: Store, small_adapter: Any) -> None:
    digest = store.add("a", small_adapter(1)).digest
    store.discard(digest)
    assert store.verify() == []


def test_notes_are_kept_with_their_times(store: Store, other: Store) -> None:
    notes = store.notes("derived")
    assert notes.read("x") is None
    notes.write("x", "first")
    notes.write("x", "second")
    assert other.notes("derived").read("x") == "second"
    assert abs(other.notes("derived").times()["x"] - time.time()) < 5
    notes.remove("x")
    notes.remove("x")
    assert other.notes("derived").times() == {}
