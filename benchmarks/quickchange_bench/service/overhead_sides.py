"""Pairs of servers that `overhead.py` compares: with a part, and without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import Client, ServedNames
from quickchange_bench.load.load_runner import closed_loop
from quickchange_bench.load.server_process import RunningServer
from quickchange_bench.load.workload import Request
from quickchange_bench.models.random_adapters import AdapterSpec, write_adapters

Part = Literal["adapters", "service"]
PARTS: tuple[Part, ...] = get_args(Part)
RESIDENT = 8
EXPERIMENT = "overhead"
# Limits of a key, checked but never reached in a round.
LIMITS = {
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 1_000_000_000,
    "concurrent_requests": 1_000,
    "max_prompt_tokens": 100_000,
    "max_new_tokens": 100_000,
}


@dataclass(frozen=True, slots=True)
class OverheadSide:
    """A server, and the name of its base in requests."""

    server: RunningServer
    target: ServedNames


@dataclass(frozen=True, slots=True)
class Sides:
    on: OverheadSide
    off: OverheadSide


@contextmanager
def adapters(model: Path, work: Path, *, device: str, dtype: str) -> Iterator[Sides]:
    """Adapters on, eight of them on the device, against a server without adapters. Requests are for
    the base."""
    names = [f"lora-{k}" for k in range(RESIDENT)]
    write_adapters(model, work / "adapters", names, AdapterSpec())

    def server(name: str, setting: str) -> own_server.OwnServer:
        environment = {"QUICKCHANGE_ADAPTERS": setting}
        return own_server.OwnServer(str(model), work / f"store-{name}", device, dtype, environment)

    with ExitStack() as stack:
        on = stack.enter_context(server("on", "true").running(work / "on.log"))
        off = stack.enter_context(server("off", "false").running(work / "off.log"))
        own_server.register(on.url, {name: work / "adapters" / name for name in names})
        asyncio.run(_use_each(on.url, names))
        target = ServedNames(own_server.BASE_NAME)
        yield Sides(OverheadSide(on, target), OverheadSide(off, target))


async def _use_each(url: str, names: Sequence[str]) -> None:
    """Ask each adapter for a token, which loads it onto the device."""
    requests = [Request(k, "Load this adapter", 1, k) for k in range(len(names))]
    async with Client(url, ServedNames(own_server.BASE_NAME, tuple(names))) as client:
        failed = [done.error for done in await closed_loop(client, requests, 1) if done.error]
    if failed:
        raise RuntimeError(f"making the adapters resident failed: {failed[0]}")


@contextmanager
def service(model: Path, work: Path, *, device: str, dtype: str) -> Iterator[Sides]:
    """API keys asked for, a key with limits, usage recorded, and an experiment of the base against
    itself, each request of another user: so each is assigned and recorded. Against a server
    without."""
    store = work / "store-on"
    admin = own_server.admin_key(store)
    asks = {"QUICKCHANGE_API_KEYS": "true"}
    with ExitStack() as stack:
        keyed = own_server.OwnServer(str(model), store, device, dtype, asks, key=admin)
        plain = own_server.OwnServer(str(model), work / "store-off", device, dtype)
        on = stack.enter_context(keyed.running(work / "on.log"))
        off = stack.enter_context(plain.running(work / "off.log"))
        own_server.create(on.url, "/v1/experiments", _experiment(), admin)
        body = {"tenant": "bench", "names": ["*"], "limits": LIMITS}
        key = own_server.create(on.url, "/v1/keys", body, admin)["secret"]
        yield Sides(
            OverheadSide(on, ServedNames(EXPERIMENT, key=key, users=True)),
            OverheadSide(off, ServedNames(own_server.BASE_NAME, users=True)),
        )


def _experiment() -> Mapping[str, object]:
    variants = [{"name": name, "model": own_server.BASE_NAME} for name in ("a", "b")]
    return {"name": EXPERIMENT, "variants": variants, "sticky": {"by": "user"}}


SIDES: Mapping[Part, Callable[..., AbstractContextManager[Sides]]] = {
    "adapters": adapters,
    "service": service,
}
