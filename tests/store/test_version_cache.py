"""The cache of fetched versions: one download for all, whole files alone, a bounded size."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quickchange_store.places.version_cache import VersionCache

NAMES = [f"{number:02x}file" for number in range(8)]


def writer(content: bytes, calls: list[bytes] | None = None) -> object:
    def fetch(path: Path) -> None:
        path.write_bytes(content)
        if calls is not None:
            calls.append(content)

    return fetch


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[0-9a-f][0-9a-f]/*")}


def test_a_file_is_fetched_once_for_all_threads_that_ask(tmp_path: Path) -> None:
    cache, calls = VersionCache(tmp_path, 1000), []

    def fetch(path: Path) -> None:
        calls.append(path)
        time.sleep(0.2)
        path.write_bytes(b"content")

    threads = [threading.Thread(target=cache.fetched, args=(NAMES[0], fetch)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1
    found = cache.find(NAMES[0])
    assert found is not None
    assert found.read_bytes() == b"content"


FETCHER = """
import sys, time
from pathlib import Path
from quickchange_store.places.version_cache import VersionCache
def fetch(path):
    with open(sys.argv[2], "a") as log:
        log.write("fetched\\n")
    time.sleep(0.5)
    path.write_bytes(b"content")
assert VersionCache(Path(sys.argv[1]), 1000).fetched("aafile", fetch).read_bytes() == b"content"
"""


def test_a_file_is_fetched_once_for_all_processes_that_ask(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FETCHER, str(tmp_path / "cache"), str(tmp_path / "log")]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_a_fetch_that_fails_leaves_nothing_and_the_next_one_fetches(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 1000)

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        cache.fetched(NAMES[0], half)
    assert files(tmp_path) == set()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert cache.fetched(NAMES[0], writer(b"whole")).read_bytes() == b"whole"


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 25)
    for age, name in enumerate(NAMES[:2]):
        path = cache.fetched(name, writer(b"0123456789"))
        os.utime(path, (time.time() - 100 + age,) * 2)
    os.utime(cache.find(NAMES[0]), (time.time() - 50,) * 2)  # used since
    cache.fetched(NAMES[2], writer(b"0123456789"))
    assert files(tmp_path) == {NAMES[0], NAMES[2]}


def test_what_was_found_in_these_seconds_stays(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 15)
    for name in NAMES[:3]:
        cache.fetched(name, writer(b"0123456789"))
    assert files(tmp_path) == set(NAMES[:3])
    for name in NAMES[:3]:
        os.utime(tmp_path / name[:2] / name, (0, 0))
    cache.fetched(NAMES[3], writer(b"0123456789"))
    assert files(tmp_path) == {NAMES[3]}


def test_a_file_that_is_mapped_outlives_its_removal(tmp_path: Path) -> None:
    import mmap

    cache = VersionCache(tmp_path, 10)
    path = cache.fetched(NAMES[0], writer(b"0123456789"))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        os.utime(path, (0, 0))
        cache.fetched(NAMES[1], writer(b"9876543210"))
        assert files(tmp_path) == {NAMES[1]}
        assert mapped[:] == b"0123456789"


def full(path: Path) -> None:
    path.write_bytes(b"part")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_makes_room_of_what_nobody_uses(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 1000)
    os.utime(cache.fetched(NAMES[0], writer(b"old")), (0, 0))

    def fits_alone(path: Path) -> None:
        if NAMES[0] in files(tmp_path):
            full(path)
        path.write_bytes(b"new")

    assert cache.fetched(NAMES[1], fits_alone).read_bytes() == b"new"
    assert files(tmp_path) == {NAMES[1]}


def test_a_disk_that_stays_full_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 1000)
    with pytest.raises(OSError, match="No space") as refused:
        cache.fetched(NAMES[0], full)
    assert refused.value.filename == str(tmp_path)
    assert files(tmp_path) == set()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_died_unfinished_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path, 1000)
    dead, alive = cache.scratch(), cache.scratch()
    dead.write_bytes(b"half")
    os.utime(dead, (0, 0))
    alive.write_bytes(b"half")
    cache.fetched(NAMES[0], writer(b"content"))
    assert not dead.exists()
    assert alive.exists()


def test_the_cache_is_its_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    VersionCache(folder, 1000).fetched(NAMES[0], writer(b"content"))
    assert folder.stat().st_mode & 0o777 == 0o700
