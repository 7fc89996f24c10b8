"""Writers that are killed at any moment, and several at once: old or new, never half."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import os_error_line
from quickchange_store.places import folder_place
from quickchange_store.store import Store

STEPS = 10  # fsyncs and renames that publishing a second version of a name makes

# Imports torch once and forks writers on demand, so that many can be killed in a short time.
NURSERY = """
import os, sys
from pathlib import Path
import torch
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import StoreError
from quickchange_store.store import Store

def adapter(value, size):
    update = LowRankUpdate(torch.full((8, size), float(value)), torch.ones(size, 8), 1.0)
    return CanonicalAdapter("L", "tiny", {"m": update}, {"value": value})

def write(value):  # publishes, moves an alias and removes old versions, for ever
    while True:
        value += 1
        store.add("a", adapter(value, 4000))
        store.alias("prod", "a")
        if value % 3 == 0:
            for version in store.versions("a")[:-2]:
                try:
                    store.remove(f"a@{version.number}")
                except StoreError:  # the other writer was quicker
                    pass
        if value % 5 == 0:
            store.gc(0)

def die(step):  # publishes once, but ends without any clean-up at the step-th fsync or rename
    left = step
    def dying(call):
        def wrapped(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*args, **options)
        return wrapped
    os.fsync, Path.rename, Path.replace = map(dying, (os.fsync, Path.rename, Path.replace))
    store.add("a", adapter(2, 4))

def publish(first):  # ten versions under a shared and an own name, collecting in between
    for value in range(first, first + 10):
        store.add("shared", adapter(value, 4))
        store.add(f"own/{first}", adapter(value, 4))
        store.alias(f"alias-{first}", f"own/{first}")
        store.gc(0)

for line in sys.stdin:
    command, root, argument = line.split()
    if command == "reap":
        print(os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1]), flush=True)
        continue
    store = Store(Path(root))
    child = os.fork()
    if child == 0:
        try:
            {"write": write, "die": die, "publish": publish}[command](int(argument))
            os._exit(0)
        finally:
            os._exit(1)
    print(child, flush=True)
"""


class Nursery:
    """Writers in processes of their own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, command: str, root: str | Path, argument: int) -> int:
        """Start a writer; its process id."""
        return self._ask(f"{command} {root} {argument}")

    def reap(self, process: int) -> int:
        """Wait for a writer; its exit status, negative where a signal ended it."""
        return self._ask(f"reap - {process}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def check(store: Store, seen: int) -> int:
    """The store is whole, and what was published before is still there; the newest number."""
    assert store.verify() == []
    if "a" not in store.names():
        assert seen == 0
        return 0
    resolved = store.resolve("a")
    adapter = store.load(resolved.digest)
    assert float(adapter.updates["m"].a[0, 0]) == adapter.source["value"]
    assert resolved.version >= seen
    return resolved.version


def test_a_killed_writer_leaves_the_old_state_or_the_new(nursery: Nursery, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    chance = random.Random(0)
    seen = kills = 0
    started = time.monotonic()
    while (lasted := time.monotonic() - started) < 6 or ((kills < 4 or not seen) and lasted < 60):
        writers = [nursery.start("write", store.location, 1000 * (kills + n)) for n in range(2)]
        for _ in range(2):
            time.sleep(chance.uniform(0.005, 0.1))
            seen = _check_while_stopped(store, writers, seen)
        for writer in writers:
            time.sleep(chance.uniform(0, 0.02))
            os.kill(writer, signal.SIGKILL)
            assert nursery.reap(writer) == -signal.SIGKILL
            kills += 1
        seen = check(store, seen)
    assert kills >= 4
    assert seen > 0
    store.gc(min_age=0)
    check(store, seen)
    assert list((Path(store.location) / "tmp").iterdir()) == []
    on_disk = {path.name for path in (Path(store.location) / "versions").glob("??/*")}
    assert on_disk == store.snapshot().digests()


def _check_while_stopped(store: Store, writers: list[int], seen: int) -> int:
    """Check the state that a kill at this very moment would leave."""
    for writer in writers:
        os.kill(writer, signal.SIGSTOP)
    try:
        return check(store, seen)
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGCONT)


@pytest.mark.parametrize("step", range(1, 14))
def test_dying_at_any_sync_or_rename_of_publishing_leaves_old_or_new(
    step: int, nursery: Nursery, tmp_path: Path, small_adapter: Any
) -> None:
    store = Store(tmp_path / "store")
    old = store.add("a", small_adapter(1))
    status = nursery.reap(nursery.start("die", store.location, step))
    assert status == (9 if step <= STEPS else 0)
    assert store.verify() == []
    served = store.resolve("a")
    assert served.version == 2 if status == 0 else served.version in (1, 2)
    if served.version == 1:
        assert served.digest == old.digest
    store.gc(min_age=0)
    assert store.verify() == []
    assert list((Path(store.location) / "tmp").iterdir()) == []
    assert store.add("b", small_adapter(2)).number == 1  # and the next writer goes on


def test_concurrent_writers_lose_nothing(nursery: Nursery, tmp_path: Path) -> None:
    root = tmp_path / "store"
    firsts = (0, 100, 105)  # the last two publish equal content at the same time
    writers = [nursery.start("publish", root, first) for first in firsts]
    assert [nursery.reap(writer) for writer in writers] == [0, 0, 0]
    store = Store(root)
    assert store.verify() == []
    assert len(store.versions("shared")) == 25
    assert [len(store.versions(f"own/{first}")) for first in firsts] == [10, 10, 10]
    assert set(store.aliases()) == {f"alias-{first}" for first in firsts}


def test_a_staged_version_that_its_writer_removes_during_collection_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_adapter: Any
) -> None:
    root = tmp_path / "store"
    store = Store(root)
    store.add("a", small_adapter(1))
    (root / "tmp" / "staged").mkdir()
    listed = folder_place.abandoned

    def listed_then_removed(path: Path, before: float) -> bool:
        found = listed(path, before)
        shutil.rmtree(path, ignore_errors=True)
        return found

    monkeypatch.setattr(folder_place, "abandoned", listed_then_removed)
    assert store.gc(0).versions == ()


class FullDisk:
    """`os.fsync` and writes of a disk that is full from the n-th on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, _descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("after", range(12))
def test_a_full_disk_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = Store(tmp_path)
    store.add("a", small(1.0))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", FullDisk(after))
        try:
            store.add("b", small(2.0))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            assert "free in" in os_error_line(error)  # noqa: PT017
            assert str(tmp_path) in os_error_line(error)  # noqa: PT017
    assert store.verify() == []
    if "b" not in store.names():
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    store.add("b", small(2.0))
    assert store.names() == ("a", "b")


def small(value: float) -> CanonicalAdapter:
    update = LowRankUpdate(torch.full((2, 8), value), torch.ones(8, 2), 1.0)
    return CanonicalAdapter("L", "tiny", {"m": update}, {})
