"""A live server with something of everything going on in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import busy_engine
import httpx
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter, make_turbo

from quickchange_store.store import Store

POISON = ord("!")  # a prompt beginning so ends the engine, and at last its request
ADAPTERS = ("orders", "tickets", "sql")


@contextmanager
def fleet(folder: Path) -> Iterator[Live]:
    """The server; nothing asks it for anything yet."""
    store = Store(folder)
    for index, name in enumerate((*ADAPTERS, "broken")):
        store.add(name, make_adapter(1.0 + index))
    store.add("fast", make_turbo(9.0, lora=True))
    broken = frozenset({store.resolve("broken").digest})
    behaviour = Behaviour(step_seconds=0.004, poison=POISON, poison_at=2, missing=broken)
    with live_server(
        folder, behaviour, engine=busy_engine.main, max_queue=8, max_request_deaths=2
    ) as live:
        yield live


def complete(http: httpx.Client, model: str, prompt: str = "abcd", **fields: Any) -> int:
    """A completion's status."""
    body = {"model": model, "prompt": prompt, "max_tokens": 24, **fields}
    return http.post("/v1/completions", json=body).status_code


def _round(http: httpx.Client) -> None:
    """One of each ordinary thing."""
    for model in (*ADAPTERS, "fast", BASE):
        complete(http, model)
    complete(http, "orders", turbo="lookup")
    complete(http, "orders", temperature=9)
    complete(http, "broken")
    http.get("/no/such/route")


def _rare(http: httpx.Client) -> None:
    """What is not to fill the load: a full queue, and an engine that dies."""
    readers = [
        threading.Thread(target=complete, args=(http, "orders"), kwargs={"max_tokens": 100})
        for _ in range(16)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    complete(http, "orders", prompt="!")


@contextmanager
def under_load(live: Live) -> Iterator[None]:
    """Clients come and go until the block ends."""
    done = threading.Event()

    def repeat(work: Callable[[httpx.Client], None], pause: float) -> None:
        with httpx.Client(base_url=live.url, timeout=30.0) as http:
            while not done.is_set():
                work(http)
                done.wait(pause)

    workers = [threading.Thread(target=repeat, args=(_round, 0.02)) for _ in range(2)]
    workers.append(threading.Thread(target=_rare, args=(live.http,)))
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


def observe(seconds: float) -> tuple[float, float]:
    """Let so much time pass; its beginning and end, Unix seconds."""
    start = time.time()
    time.sleep(seconds)
    return start, time.time()
