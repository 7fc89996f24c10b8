"""A live server with something of everything going on in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import busy_engine
import httpx
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter, make_turbo, wait_until
from keys_support import bearer, make_key
from text_support import byte_text

from quickchange_store.store import Store

ROUNDS = 4  # with these every series has been seen to grow, and one tenant meets its limit
POISON = ord("!")  # a prompt beginning so ends the engine, and at last its request
ADAPTERS = ("orders", "tickets", "sql")
EXPERIMENT = {
    "name": "tone",
    "variants": [{"name": "a", "model": "orders"}, {"name": "b", "model": "tickets"}],
    "shadows": [{"name": "c", "model": "sql"}],
    "metrics": [{"name": "liked", "kind": "flag"}],
}


@dataclass(frozen=True)
class Fleet:
    """The server, and the headers of its two tenants' requests."""

    live: Live
    tenants: tuple[Mapping[str, str], Mapping[str, str]]


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """The server, its experiment running; nothing asks it for anything yet."""
    store = Store(folder)
    for index, name in enumerate((*ADAPTERS, "broken")):
        store.add(name, make_adapter(1.0 + index))
    store.add("fast", make_turbo(9.0, lora=True))
    broken = frozenset({store.resolve("broken").digest})
    behaviour = Behaviour(step_seconds=0.004, poison=POISON, poison_at=2, missing=broken)
    operator, tenants, asked = keys(folder)
    with live_server(
        folder,
        behaviour,
        byte_text(),
        busy_engine.main,
        max_queue=8,
        max_request_deaths=2,
        **asked,
    ) as live:
        live.http.headers.update(operator)
        live.post("/v1/experiments", EXPERIMENT)
        yield Fleet(live, tenants)


def keys(
    folder: Path,
) -> tuple[Mapping[str, str], tuple[Mapping[str, str], Mapping[str, str]], dict[str, Any]]:
    """Headers of an operator and of two tenants, one of them limited; and the server's setting."""
    _, operator = make_key(folder, "operator", "admin")
    _, acme = make_key(folder, "acme")
    _, globex = make_key(folder, "globex", requests_per_minute=20)
    return bearer(operator), (bearer(acme), bearer(globex)), {"api_keys": True}


def complete(http: httpx.Client, model: str, prompt: str = "abcd", **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 24, **fields}
    return http.post("/v1/completions", json=body)


def _round(http: httpx.Client, number: int) -> None:
    """One of each ordinary thing."""
    for model in (*ADAPTERS, "fast", BASE):
        complete(http, model)
    complete(http, "orders", turbo="lookup")
    complete(http, "orders", temperature=9)
    complete(http, "orders", response_format={"type": "json_object"})
    complete(http, "broken")
    http.get("/no/such/route")
    answer = complete(http, "tone", user=f"user {number}")
    if answer.status_code == 200:
        outcome = {"name": "liked", "value": True, "completion": answer.json()["id"]}
        http.post("/v1/experiments/tone/outcomes", json=outcome)


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
def under_load(fleet: Fleet) -> Iterator[Callable[[], int]]:
    """Clients come and go until the block ends; yields how many rounds each has made at least."""
    done = threading.Event()
    made = dict.fromkeys(map(id, fleet.tenants), 0)

    def work(headers: Mapping[str, str]) -> None:
        with httpx.Client(base_url=fleet.live.url, timeout=600.0, headers=headers) as http:
            for number in count():
                if done.wait(0.02):
                    return
                _round(http, number)
                made[id(headers)] = number + 1

    workers = [threading.Thread(target=work, args=(headers,)) for headers in fleet.tenants]
    workers.append(threading.Thread(target=_rare, args=(fleet.live.http,)))
    for worker in workers:
        worker.start()
    try:
        yield lambda: min(made.values())
    finally:
        done.set()
        for worker in workers:
            worker.join()


def observe(seconds: float, rounds: Callable[[], int]) -> tuple[float, float]:
    """Let so much time pass, and ROUNDS be made; its beginning and end, Unix seconds."""
    start = time.time()
    time.sleep(seconds)
    wait_until(lambda: rounds() >= ROUNDS, 100 * seconds)
    return start, time.time()
