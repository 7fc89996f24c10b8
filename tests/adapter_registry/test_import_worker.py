"""The worker that imports adapters: it stays while there is work, and ends when it is idle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from quickchange_server.adapter_registry import import_runner
from quickchange_server.adapter_registry.import_runner import WorkerRunner
from quickchange_store.store import Store

WAIT = 60.0  # seconds until a test that hangs fails


def process_id(_store: object, _base: object) -> int:
    """The id of the process that runs this."""
    return os.getpid()


async def alone(store: Path, use: Callable[[WorkerRunner], Awaitable[None]]) -> None:
    runner = WorkerRunner(Store(store), "no model is read", None)
    try:
        await use(runner)
    finally:
        await runner.close()


async def ended(process: int) -> None:
    """Wait until a process is gone."""
    async with asyncio.timeout(WAIT):
        while psutil.pid_exists(process):
            await asyncio.sleep(0.02)


def test_an_idle_worker_ends_and_the_next_import_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_runner, "IDLE_SECONDS", 0.2)

    async def use(runner: WorkerRunner) -> None:
        first = await runner.run(process_id)
        assert first != os.getpid()
        await ended(first)
        assert await runner.run(process_id) != first

    asyncio.run(alone(tmp_path, use))


def test_imports_in_a_row_share_one_worker_which_close_ends(tmp_path: Path) -> None:
    processes: list[int] = []

    async def use(runner: WorkerRunner) -> None:
        processes.extend([await runner.run(process_id) for _ in range(3)])
        assert psutil.pid_exists(processes[0])

    asyncio.run(alone(tmp_path, use))
    assert len(set(processes)) == 1
    assert not psutil.pid_exists(processes[0])
