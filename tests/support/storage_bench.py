"""Measures the database's writer: python tests/support/storage_bench.py, on the disk of TMPDIR.

Records are rows as an answer's entry in the books is: a dozen values.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from postgres_server import postgres_server
from prometheus_client import CollectorRegistry
from sqlalchemy import (
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
)

from quickchange_server.observability.subsystem_metrics import StorageMetrics
from quickchange_server.storage.database import Database

ENTRIES = Table(
    "bench_entries",
    MetaData(),
    Column("number", Integer, primary_key=True, autoincrement=True),
    *(Column(name, String(64)) for name in ("request", "tenant", "key", "model", "variant")),
    *(Column(name, Integer) for name in ("prompt", "completion", "cached", "drafted")),
    *(Column(name, Float) for name in ("at", "first", "seconds")),
)
BURST = 20_000
RATE = 2_000  # records a second
SECONDS = 8.0
WRITES = 100


def entry(number: int) -> Callable[[Connection], None]:
    values = {
        "request": f"cmpl-{number:032x}",
        **dict.fromkeys(("tenant", "key", "model", "variant"), "a-name-of-usual-length"),
        **dict.fromkeys(("prompt", "completion", "cached", "drafted"), 100),
        **dict.fromkeys(("at", "first", "seconds"), 0.5),
    }

    def change(connection: Connection) -> None:
        connection.execute(insert(ENTRIES).values(values))

    return change


async def watch_loop(delays: list[float]) -> None:
    """The delay with which the event loop wakes a task that sleeps a millisecond, in seconds."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        delays.append(time.perf_counter() - began - 0.001)


def took(commits: list[float], began: float, _record: asyncio.Future[None]) -> None:
    commits.append(time.perf_counter() - began)


async def burst(database: Database) -> float:
    """Records a second where they come as fast as they can be asked for."""
    began = time.perf_counter()
    futures = []
    for number in range(BURST):
        futures.append(database.record(entry(number)))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*futures)
    return BURST / (time.perf_counter() - began)


async def steady(database: Database | None) -> tuple[list[float], list[float]]:
    """The loop's delays, and each record's time to its commit, at RATE. None: the loop alone."""
    delays: list[float] = []
    commits: list[float] = []
    watching = asyncio.create_task(watch_loop(delays))
    began = time.perf_counter()
    asked = 0
    while (now := time.perf_counter() - began) < SECONDS:
        while database is not None and asked < now * RATE:
            done = partial(took, commits, time.perf_counter())
            database.record(entry(asked)).add_done_callback(done)
            asked += 1
        await asyncio.sleep(0.002)
    watching.cancel()
    return delays, commits


async def writes(database: Database) -> list[float]:
    """Seconds of one write after the other."""
    times = []
    for number in range(WRITES):
        began = time.perf_counter()
        await database.write(entry(number))
        times.append(time.perf_counter() - began)
    return times


def quantiles(name: str, seconds: list[float]) -> str:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return f"{name} p50 {p50:.2f} p99 {p99:.2f} longest {max(seconds) * 1e3:.2f} ms"


async def measure(name: str, url: str) -> None:
    registry = CollectorRegistry()
    database = await asyncio.to_thread(Database.open, url, StorageMetrics(registry))
    print(f"{name}: {quantiles('write', await writes(database))}", flush=True)
    delays, commits = await steady(database)
    print(f"  {RATE}/s: {quantiles('loop late', delays)}; {quantiles('record', commits)}")
    total = registry.get_sample_value("quickchange_storage_commit_seconds_count") or 0.0
    print(f"  {len(commits)} records in {total - WRITES:.0f} commits")
    print(f"  burst: {await burst(database):.0f} records/s", flush=True)
    await database.close()


async def main(urls: dict[str, str]) -> None:
    delays, _ = await steady(None)
    print(f"nothing recorded: {quantiles('loop late', delays)}", flush=True)
    for name, url in urls.items():
        engine = create_engine(url)
        ENTRIES.create(engine)
        engine.dispose()
        await measure(name, url)


if __name__ == "__main__":
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(postgres_server())
        asyncio.run(
            main(
                {
                    "sqlite": f"sqlite:///{folder / 'bench.sqlite3'}",
                    "postgresql": server.make_database(),
                }
            )
        )
