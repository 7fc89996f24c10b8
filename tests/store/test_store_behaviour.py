"""What one store promises: references, names, damage, garbage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_support import file_system_of, remove_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_store.errors import (
    AdapterNotFoundError,
    AmbiguousVersionError,
    CorruptStoreError,
    CorruptVersionError,
    InUseError,
    InvalidAdapterError,
    InvalidNameError,
    NameConflictError,
    NoStoreError,
)
from quickchange_store.files import held_directory
from quickchange_store.index import Index, decode, encode
from quickchange_store.names import RESERVED, check_name, parse_reference
from quickchange_store.places.index_file import IndexFile
from quickchange_store.store import Store


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(params=["folder", "bucket"])
def store(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A store in a folder, and one in a bucket."""
    if request.param == "folder":
        yield Store(tmp_path / "store")
        return
    monkeypatch.setenv("QUICKCHANGE_STORE_CACHE", str(tmp_path / "cache"))
    yield Store("memory://behaviour/store")
    remove_memory()


def snapshot(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


# --- names and references -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        ".",
        "../up",
        "a/../b",
        "a/..",
        "/etc/passwd",
        "a//b",
        "a/",
        ".hidden",
        "-x",
        "a b",
        "a\nb",
        "a\n",
        "a\x00b",
        "a\\b",
        "naïve",
        "x" * 129,
        "/".join(["x" * 120] * 3),
        *sorted(RESERVED),
        "BASE",
    ],
)
def test_a_name_that_breaks_the_rules_is_refused(
    name: str, store: Store, small_adapter: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidNameError):
        store.add(name, small_adapter(1))
    assert snapshot(tmp_path) == set()


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "org/model", "9", "a..b", "x" * 128, "a/b/c"])
def test_a_name_that_follows_the_rules_is_accepted(
    name: str, store: Store, small_adapter: Any
) -> None:
    store.add(name, small_adapter(1))
    assert store.names() == (name,)


@settings(max_examples=300, deadline=None)
@given(name=st.text(alphabet="aZ9._-/\\@ \n\x00é", max_size=12))
def test_no_name_reaches_outside_the_store(name: str) -> None:
    try:
        check_name(name)
    except InvalidNameError:
        return
    assert not any(part in ("", ".", "..") for part in name.split("/"))
    assert not name.startswith(("/", "."))
    assert "@" not in name


def test_all_files_stay_inside_the_store(tmp_path: Path, small_adapter: Any) -> None:
    Store(tmp_path / "store").add("org/deep/name", small_adapter(1))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert not any("deep" in str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("reference", ["a@", "a@0", "a@-1", "a@xyz", "a@12345g", "a@@1", "a@1@2"])
def test_a_malformed_version_is_refused(reference: str) -> None:
    with pytest.raises(InvalidNameError) as error:
        parse_reference(reference)
    assert error.value.remedy


@pytest.mark.parametrize("digest", ["../../etc/passwd", "ab", "", "g" * 64, "A" * 64])
def test_what_is_not_a_digest_is_not_found(digest: str, store: Store) -> None:
    with pytest.raises(AdapterNotFoundError):
        store.load(digest)


def test_a_digest_prefix_finds_its_version(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    store.add("a", small_adapter(2))
    assert store.resolve(f"a@{version.digest[:6]}").version == 1
    assert store.resolve(f"a@{version.digest.upper()}").version == 1


def test_a_short_digest_prefix_is_refused(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    with pytest.raises((InvalidNameError, AdapterNotFoundError)):
        store.resolve(f"a@{version.digest[:5]}")


def test_an_ambiguous_digest_prefix_names_its_versions() -> None:
    digests = ["abcdef" + "0" * 58, "abcdef" + "1" * 58]
    tree = {
        "format": 1,
        "aliases": {},
        "names": {
            "a": {
                "current": 1,
                "next": 3,
                "versions": {
                    str(number): {"digest": digest, "created": 0}
                    for number, digest in enumerate(digests, 1)
                },
            }
        },
    }
    index = decode(json.dumps(tree).encode(), Path("index.json"))
    with pytest.raises(AmbiguousVersionError, match=digests[1]):
        index.find(parse_reference("a@abcdef"))
    assert index.find(parse_reference("a@abcdef1")).number == 2


def test_a_number_wins_over_a_digest_that_begins_with_it() -> None:
    tree = {
        "format": 1,
        "aliases": {},
        "names": {
            "a": {
                "current": 1,
                "next": 123457,
                "versions": {
                    "1": {"digest": "123456" + "a" * 58, "created": 0},
                    "123456": {"digest": "b" * 64, "created": 0},
                },
            }
        },
    }
    index = decode(json.dumps(tree).encode(), Path("index.json"))
    assert index.find(parse_reference("a@123456")).digest == "b" * 64
    assert index.find(parse_reference("a@123456aa")).number == 1


# --- versions, aliases --------------------------------------------------------------------------


def test_adding_the_same_content_again_gives_the_existing_version(
    store: Store, small_adapter: Any
) -> None:
    first = store.add("a", small_adapter(1))
    assert store.add("a", small_adapter(1)) == first
    assert store.versions("a") == (first,)


def test_adding_old_content_again_serves_it_again(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.add("a", small_adapter(2))
    assert store.add("a", small_adapter(1)).number == 1
    assert store.resolve("a").version == 1


def test_a_floating_alias_follows_and_a_fixed_one_stays(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.alias("floating", "a")
    store.alias("fixed", "a@1")
    store.add("a", small_adapter(2))
    assert store.resolve("floating").version == 2
    assert store.resolve("fixed").version == 1
    store.rollback("a")
    assert store.resolve("floating").version == 1


def test_an_alias_of_a_digest_keeps_the_version(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    assert str(store.alias("prod", f"a@{version.digest[:8]}")) == "a@1"


def test_an_alias_has_no_versions(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.alias("prod", "a")
    with pytest.raises(AdapterNotFoundError, match="a@1"):
        store.resolve("prod@1")


def test_an_alias_of_an_alias_is_refused(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.alias("prod", "a")
    with pytest.raises(NameConflictError, match="point it at a"):
        store.alias("next", "prod")


def test_removing_what_an_alias_points_at_names_the_alias(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.alias("prod", "a")
    with pytest.raises(InUseError, match="'prod'"):
        store.remove("a")


def test_a_number_is_not_used_twice(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.add("a", small_adapter(2))
    store.rollback("a")
    store.remove("a@2")
    assert store.add("a", small_adapter(3)).number == 3


def test_an_unknown_name_says_how_to_find_one(store: Store) -> None:
    with pytest.raises(AdapterNotFoundError, match="adapters list"):
        store.resolve("missing")


# --- content ------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_added(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(7))
    loaded = store.load(version.digest)
    assert loaded.base_name == "tiny"
    (path,) = loaded.updates
    assert torch.equal(loaded.updates[path].a, small_adapter(7).updates[path].a)


def test_info_needs_no_tensors(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(7))
    store.path(version.digest).write_bytes(b"")  # nothing of it is read
    info = store.info(version.digest)
    assert (info.max_rank, info.targets, info.modules) == (2, ("q_proj",), 1)
    assert (info.parameters, info.dtypes) == (2 * 4 + 3 * 2, ("float32",))
    assert info.size > 4 * info.parameters


def test_a_loaded_adapter_outlives_its_removal(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(7))
    loaded = store.load(version.digest)
    store.remove("a")
    store.gc(min_age=0)
    assert float(loaded.updates["model.layers.0.q_proj"].a.sum()) == 2 * 4 * 7


def test_a_source_that_is_not_plain_data_is_refused_and_leaves_nothing(
    folder_store: Store, small_adapter: Any
) -> None:
    import dataclasses

    bad = dataclasses.replace(small_adapter(1), source={"model": object()})
    with pytest.raises(InvalidAdapterError, match="source"):
        folder_store.add("a", bad)
    assert folder_store.names() == ()
    assert list((Path(folder_store.location) / "tmp").iterdir()) == []


def test_names_and_digests_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quickchange_store.store import Store; "
        f"Store(Path({str(tmp_path)!r})).names(); "
        "import quickchange_store.errors; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# --- damage -------------------------------------------------------------------------------------


def spoil(store: Store, digest: str) -> None:
    """Flip a bit of a version where it is kept, and in the cache of a bucket's store."""
    for where in (store.path(digest), Path(store.address(digest))):
        if "://" in store.location and "memory:" in str(where):
            files, path = file_system_of(store), store.address(digest)
            files.pipe_file(path, flipped(files.cat_file(path)))
        else:
            where.write_bytes(flipped(where.read_bytes()))
        if "://" not in store.location:
            return


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_verify_names_a_damaged_version(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    store.add("b", small_adapter(1))
    store.add("b", small_adapter(2))
    spoil(store, version.digest)
    (problem,) = store.verify()
    assert problem.subject == "a@1, b@1"
    assert "digest" in problem.what


def test_verified_loading_refuses_a_damaged_version(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    spoil(store, version.digest)
    with pytest.raises(CorruptVersionError, match="repairs"):
        store.load(version.digest)


def test_adding_the_content_again_repairs_a_damaged_version(
    store: Store, small_adapter: Any
) -> None:
    version = store.add("a", small_adapter(1))
    spoil(store, version.digest)
    assert store.add("a", small_adapter(1)) == version
    assert store.verify() == []


def test_verify_names_a_missing_version(store: Store, small_adapter: Any) -> None:
    version = store.add("a", small_adapter(1))
    if "://" in store.location:
        file_system_of(store).rm(store.address(version.digest))
    else:
        store.path(version.digest).unlink()
    (problem,) = store.verify()
    assert version.digest in problem.what


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"format": 99}',
        '{"format": 1, "names": {"a": {"current": 2, "next": 3, "versions": {}}}, "aliases": {}}',
        '{"format": 1, "names": {}, "aliases": {"p": {"name": "a", "version": null}}}',
    ],
)
def test_a_damaged_index_is_named(content: str, folder_store: Store, small_adapter: Any) -> None:
    folder_store.add("a", small_adapter(1))
    (Path(folder_store.location) / "index.json").write_text(content)
    with pytest.raises(CorruptStoreError, match=r"index\.json"):
        folder_store.resolve("a")
    assert len(folder_store.verify()) == 1


def test_an_index_survives_encoding(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    store.alias("prod", "a@1")
    index = store.snapshot()
    assert decode(encode(index), Path("index.json")) == index


# --- garbage ------------------------------------------------------------------------------------


def test_gc_keeps_what_is_young_and_what_is_named(folder_store: Store, small_adapter: Any) -> None:
    kept = folder_store.add("a", small_adapter(1))
    gone = folder_store.add("b", small_adapter(2))
    os.utime(folder_store.path(gone.digest).parent, (0, 0))  # an old version, removed just now
    folder_store.remove("b")
    assert folder_store.gc(min_age=60).versions == ()
    assert folder_store.gc(min_age=0).versions == (gone.digest,)
    assert folder_store.load(kept.digest)


def test_gc_removes_what_a_dead_writer_left(folder_store: Store, small_adapter: Any) -> None:
    folder_store.add("a", small_adapter(1))
    left = Path(folder_store.location) / "tmp" / "dead"
    left.mkdir()
    (left / "adapter.safetensors").write_bytes(b"half")
    (Path(folder_store.location) / "tmp" / "index.json.dead").write_bytes(b"half")
    assert folder_store.gc(min_age=60).temporaries == 0
    done = folder_store.gc(min_age=0)
    assert (done.temporaries, done.bytes) == (2, 8)
    assert list((Path(folder_store.location) / "tmp").iterdir()) == []


def test_gc_leaves_a_living_writer_alone(folder_store: Store, small_adapter: Any) -> None:
    folder_store.add("a", small_adapter(1))
    directory = Path(folder_store.location) / "tmp" / "alive"
    with held_directory(directory):
        assert folder_store.gc(min_age=0).temporaries == 0
        assert directory.exists()
    assert folder_store.gc(min_age=0).temporaries == 1


def test_gc_of_a_store_that_is_not_there_does_nothing(folder_store: Store) -> None:
    assert folder_store.gc(min_age=0).versions == ()
    assert not Path(folder_store.location).exists()


# --- reading while others write -----------------------------------------------------------------


def test_a_reader_sees_a_change_that_lands_in_the_same_clock_tick(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    reader = IndexFile(path)
    assert reader.read() == Index()
    for generation in range(50):
        tree = {"format": 1, "aliases": {}, "names": {}}
        tree["names"] = {
            f"n{generation % 10}": {
                "current": 1,
                "next": 2,
                "versions": {"1": {"digest": f"{generation % 10}" * 64, "created": 0}},
            }
        }
        scratch = tmp_path / "scratch"
        scratch.write_bytes(json.dumps(tree).encode())
        os.utime(scratch, (1, 1))  # always the same time and the same size
        scratch.replace(path)
        assert list(reader.read().entries) == [f"n{generation % 10}"]


def test_an_unchanged_index_is_read_once(store: Store, small_adapter: Any) -> None:
    store.add("a", small_adapter(1))
    assert store.snapshot() is store.snapshot()


def test_a_reader_keeps_one_file_open(folder_store: Store, small_adapter: Any) -> None:
    folder_store.add("a", small_adapter(0))
    folder_store.resolve("a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for value in range(1, 6):
        folder_store.add("a", small_adapter(value))
        folder_store.resolve("a")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_threads_of_one_store_lose_no_version(store: Store, small_adapter: Any) -> None:
    def work(start: int) -> None:
        for value in range(start, start + 4):
            store.add("a", small_adapter(value))

    threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [version.number for version in store.versions("a")] == list(range(1, 13))
    assert store.verify() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.remove("a"),
        lambda store: store.rollback("a"),
        lambda store: store.alias("a", "b"),
        lambda store: store.unalias("a"),
    ],
)
def test_a_change_of_a_store_that_is_not_there_makes_nothing(
    store: Store, tmp_path: Path, change: Any
) -> None:
    with pytest.raises(AdapterNotFoundError):
        change(store)
    assert not store.keep("0" * 64)
    store.discard("0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_there_from_its_first_adapter_on(store: Store, small_adapter: Any) -> None:
    with pytest.raises(NoStoreError, match="no store here"):
        Store.at(store.location)
    store.add("a", small_adapter(1))
    assert Store.at(store.location).names() == ("a",)
    store.remove("a")
    assert Store.at(store.location).names() == ()
