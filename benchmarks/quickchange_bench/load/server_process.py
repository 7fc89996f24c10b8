"""Server process of a benchmark: started, awaited, and ended by its own process id."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quickchange_bench.load.load_client import Client, DialectName, ServedNames
from quickchange_bench.load.process_usage import require_psutil, tree
from quickchange_bench.load.workload import Request

STOP_SECONDS = 30.0  # for a server to drain before it is killed
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. `pid` is the root of its process tree."""

    url: str
    pid: int
    start_seconds: float  # from its command to its first token


class ServerFailedError(RuntimeError):
    """A server ended or stayed silent; the message ends with the last lines of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def quickchange_command(*arguments: str) -> list[str]:
    """This project's command line in this Python, installed as a script or not."""
    start = "import sys; from quickchange_server.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, *arguments]


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception in the block, so that its server ends with the benchmark."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def running(
    command: Sequence[str],
    *,
    url: str,
    target: ServedNames,
    log: Path,
    dialect: DialectName = "openai",
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> Iterator[RunningServer]:
    """Run `command` until the block ends. It is ready once the base model gives one token.

    Raises:
        ServerFailedError: it ended, or was not ready in `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, _unwinding_on_sigterm():
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        try:
            seconds = _wait_ready(process, url, target, dialect, log, timeout)
            yield RunningServer(url=url, pid=process.pid, start_seconds=seconds)
        finally:
            stop(process)


def _wait_ready(
    process: subprocess.Popen[bytes],
    url: str,
    target: ServedNames,
    dialect: DialectName,
    log: Path,
    timeout: float,
) -> float:
    started = time.monotonic()
    answer = "no answer yet"
    while time.monotonic() - started < timeout:
        if (code := process.poll()) is not None:
            raise ServerFailedError(f"the server ended with status {code}; {tail(log)}")
        error = asyncio.run(_probe(url, target, dialect))
        if error is None:
            return time.monotonic() - started
        answer = error
        time.sleep(POLL_SECONDS)
    raise ServerFailedError(f"not ready after {timeout:.0f} s ({answer}); {tail(log)}")


async def _probe(url: str, target: ServedNames, dialect: DialectName) -> str | None:
    """None if the base model gave a token, else the fault."""
    async with Client(url, target, dialect, timeout=120.0) as client:
        request = Request(index=0, prompt="Ready", output_tokens=1, adapter=None)
        return (await client.complete(request)).error


def tail(log: Path, lines: int = 15) -> str:
    last = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"last lines of {log}:", *last])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the server, and SIGKILL to what is left of its tree after STOP_SECONDS."""
    psutil = require_psutil()
    family = tree(process.pid)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    left = [member for member in family if member.pid != process.pid]
    _, alive = psutil.wait_procs(left, timeout=5.0)
    for member in alive:
        member.kill()  # psutil checks the start time: never another process under the same id
