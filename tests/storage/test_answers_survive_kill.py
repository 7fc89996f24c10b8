"""An answer whose end a client has seen is on record, whatever happens to the server then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from http_support import BASE
from storage_support import notes_at

SCRIPT = Path(__file__).parents[1] / "support" / "serve_recording.py"
SUPPORT = (SCRIPT.parent, SCRIPT.parents[1] / "server", SCRIPT.parents[1] / "support")
CLIENTS = 6
ENDED = 60  # answers before the kill
LIMIT_SECONDS = 180.0


@contextmanager
def served(store: Path, database: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in a process of its own, and its address. Killed in the end."""
    path = os.pathsep.join([*map(str, SUPPORT), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(store), database, "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_SECONDS)


def ask(url: str, seen: list[str], stream: bool) -> None:
    """Ask until the server is gone; add the id of each answer that has ended."""
    body = {"model": BASE, "prompt": "abc", "max_tokens": 4, "stream": stream}
    with suppress(httpx.TransportError), httpx.Client(base_url=url) as http:
        while True:
            text = http.post("/v1/completions", json=body).raise_for_status().text
            if not stream:
                seen.append(json.loads(text)["id"])
            elif text.endswith("data: [DONE]\n\n"):
                seen.append(json.loads(text.split("\n", 1)[0].removeprefix("data: "))["id"])


def test_every_answer_that_ended_is_on_record_after_a_sigkill(
    tmp_path: Path, database_url: str
) -> None:
    seen: list[str] = []
    with served(tmp_path / "store", database_url) as (process, url):
        clients = [
            threading.Thread(target=ask, args=(url, seen, number % 2 == 0))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        end = time.monotonic() + LIMIT_SECONDS
        while len(seen) < ENDED and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        for client in clients:
            client.join()
    assert len(seen) >= ENDED
    assert set(seen) <= set(notes_at(database_url))
