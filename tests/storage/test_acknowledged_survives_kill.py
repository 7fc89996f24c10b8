"""What was acknowledged is there after a SIGKILL of the server's process or of the database's."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgres_server import PostgresServer, postgres_server
from storage_support import noted, notes_at

WRITER = Path(__file__).parents[1] / "support" / "write_until_killed.py"
STRIDES = (0.15, 0.6)  # seconds of writing before the kill
LIMIT_SECONDS = 180.0


class WriterProcess:
    """A process that writes, and what it has acknowledged. Ended by SIGKILL."""

    def __init__(self, url: str, label: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WRITER), url, label], stdout=subprocess.PIPE, text=True
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for_lines(self, count: int) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while len(self._lines) < count:
            assert self._process.poll() is None, "the writer ended by itself"
            assert time.monotonic() < end, "the writer does not get on"
            time.sleep(0.01)

    def acknowledged(self) -> list[str]:
        """Kill it; what it printed in whole lines until then."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        return [line.strip() for line in self._lines if line.endswith("\n")]

    @property
    def count(self) -> int:
        return len(self._lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self._lines.extend(lines)


@contextmanager
def writer(url: str, label: str) -> Iterator[WriterProcess]:
    process = WriterProcess(url, label)
    try:
        yield process
    finally:
        process.acknowledged()


def make_table(url: str) -> None:
    async def main() -> None:
        async with noted(url):
            pass

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_acknowledged_changes_survive_the_servers_sigkill(database_url: str, seed: int) -> None:
    make_table(database_url)
    with writer(database_url, "a") as process:
        process.wait_for_lines(1)
        time.sleep(random.Random(seed).uniform(*STRIDES))
        acknowledged = process.acknowledged()
    kept = notes_at(database_url)
    assert len(acknowledged) > 20
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))


def test_two_processes_on_one_database_lose_nothing_when_one_is_killed(database_url: str) -> None:
    make_table(database_url)
    with writer(database_url, "a") as first, writer(database_url, "b") as second:
        first.wait_for_lines(200)
        second.wait_for_lines(200)
        of_first = first.acknowledged()
        second.wait_for_lines(second.count + 200)
        of_second = second.acknowledged()
    assert set(of_first) | set(of_second) <= set(notes_at(database_url))


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may crash."""
    with postgres_server() as server:
        yield server


def test_acknowledged_changes_survive_a_crash_of_postgresql_and_go_on_after_it(
    own_postgres: PostgresServer,
) -> None:
    url = own_postgres.make_database()
    make_table(url)
    with writer(url, "a") as process:
        process.wait_for_lines(200)
        own_postgres.stop(signal.SIGQUIT)
        time.sleep(0.3)
        before = process.count
        own_postgres.start()
        process.wait_for_lines(before + 200)
        acknowledged = process.acknowledged()
    kept = notes_at(url)
    assert set(acknowledged) <= set(kept)
    order = [tuple(int(part) for part in t.split("-")[1:]) for t in kept if "written" not in t]
    first_gap = next((i for i, key in enumerate(order) if key != (i // 20, i % 20)), len(order))
    assert first_gap == len(order), "records were lost, doubled or out of order"
