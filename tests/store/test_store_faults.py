"""Writers that are killed at any moment, and several at once: old or new, never half."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quickchange_store.store import Store

# Publishes small and larger adapters, moves an alias and removes old versions, for ever.
WRITER = """
import sys
from pathlib import Path
import torch
from quickchange_store.canonical import CanonicalAdapter, LowRankUpdate
from quickchange_store.store import Store

store = Store(Path(sys.argv[1]))
value = int(sys.argv[2])
print("ready", flush=True)
while True:
    value += 1
    update = LowRankUpdate(torch.full((8, 4000), float(value)), torch.ones(4000, 8), 1.0)
    store.add("a", CanonicalAdapter("L", "tiny", {"m": update}, {"value": value}))
    store.alias("prod", "a")
    if value % 3 == 0:
        for version in store.versions("a")[:-2]:
            store.remove(f"a@{version.number}")
    if value % 5 == 0:
        store.gc(0)
"""


def check(store: Store, seen: int) -> int:
    """The store is whole, and what was published before is still there; the newest number."""
    assert store.verify() == []
    if "a" not in store.names():
        assert seen == 0
        return 0
    resolved = store.resolve("a")
    adapter = store.load(resolved.digest, verify=True)
    assert float(adapter.updates["m"].a[0, 0]) == adapter.source["value"]
    assert resolved.version >= seen
    return resolved.version


def test_a_killed_writer_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    chance = random.Random(0)
    seen = kills = 0
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        # A fork server would be quicker, but a plain process can be killed at any instruction.
        writers = [_start_writer(store.root, 1000 * (2 * kills + n)) for n in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        for _ in range(3):
            time.sleep(chance.uniform(0.005, 0.08))
            for writer in writers:
                writer.send_signal(signal.SIGSTOP)
            try:
                seen = check(store, seen) if _lock_is_free(store) else seen
            finally:
                for writer in writers:
                    writer.send_signal(signal.SIGCONT)
        for writer in writers:
            time.sleep(chance.uniform(0, 0.02))
            writer.kill()
            writer.wait(30)
            assert writer.stdout is not None
            writer.stdout.close()
            kills += 1
        seen = check(store, seen)
    assert kills >= 2
    assert seen > 0
    store.gc(min_age=0)
    check(store, seen)
    assert list((store.root / "tmp").iterdir()) == []
    on_disk = {path.name for path in (store.root / "versions").glob("??/*")}
    assert on_disk == store.snapshot().digests()


def _start_writer(root: Path, value: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(value)], stdout=subprocess.PIPE
    )


def _lock_is_free(store: Store) -> bool:
    """Whether no stopped writer is inside a change; else its removals could race the check."""
    import fcntl

    try:
        descriptor = os.open(store.root / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.mark.parametrize("step", range(1, 14))
def test_dying_at_any_system_call_of_publishing_leaves_old_or_new(
    step: int, tmp_path: Path, small_adapter: Any
) -> None:
    store = Store(tmp_path / "store")
    old = store.add("a", small_adapter(1))
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=_die_at, args=(store.root, small_adapter(2), step))
    writer.start()
    writer.join(60)
    assert writer.exitcode in (0, 9)
    assert store.verify() == []
    served = store.resolve("a")
    finished = writer.exitcode == 0
    assert served.version == 2 if finished else served.version in (1, 2)
    if served.version == 1:
        assert served.digest == old.digest
    store.gc(min_age=0)
    assert store.verify() == []
    assert list((store.root / "tmp").iterdir()) == []
    assert store.add("a", small_adapter(2)).number == 2  # and the next writer goes on


def _die_at(root: Path, adapter: Any, step: int) -> None:
    """Publish, but end without any clean-up at the `step`-th fsync or rename."""
    left = step

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*args, **options)

        return wrapped

    os.fsync = dying(os.fsync)
    Path.rename = dying(Path.rename)  # type: ignore[method-assign]
    Path.replace = dying(Path.replace)  # type: ignore[method-assign]
    Store(root).add("a", adapter)
    os._exit(0)


ADDER = """
import sys
from pathlib import Path
import torch
from quickchange_store.canonical import CanonicalAdapter, LowRankUpdate
from quickchange_store.store import Store

store = Store(Path(sys.argv[1]))
first = int(sys.argv[2])
for value in range(first, first + 10):
    update = LowRankUpdate(torch.full((2, 4), float(value)), torch.ones(3, 2), 1.0)
    content = CanonicalAdapter("L", "tiny", {"m": update})
    store.add("shared", content)
    store.add(f"own/{first}", content)
    store.alias(f"alias-{first}", f"own/{first}")
    store.gc(0)
"""


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    writers = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(root), str(first)])
        for first in (0, 100, 105)  # the last two publish equal content at the same time
    ]
    try:
        codes = [writer.wait(120) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert codes == [0, 0, 0]
    store = Store(root)
    assert store.verify() == []
    assert len(store.versions("shared")) == 25
    assert [len(store.versions(f"own/{first}")) for first in (0, 100, 105)] == [10, 10, 10]
    assert set(store.aliases()) == {"alias-0", "alias-100", "alias-105"}
