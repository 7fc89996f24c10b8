"""What the tests of the engine's client share: a client over a fake engine in a real process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fake_engine
from fake_engine import Behaviour

from quickchange_server.config import Settings
from quickchange_server.engine_client.client import DeltaStream, EngineClient
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.errors import QuickchangeError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, SamplingParams, Submit

TIME_LIMIT_SECONDS = 180.0  # on a busy machine


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIME_LIMIT_SECONDS))


def make_settings(**changes: Any) -> Settings:
    return Settings(model="fake", store=Path("store"), **changes)


@asynccontextmanager
async def client_of(
    behaviour: Behaviour | None = None, metrics: Metrics | None = None, **changes: Any
) -> AsyncIterator[EngineClient]:
    client = make_client(behaviour, metrics, **changes)
    await client.start()
    try:
        yield client
    finally:
        await client.close(drain_seconds=0)


def make_client(
    behaviour: Behaviour | None = None, metrics: Metrics | None = None, **changes: Any
) -> EngineClient:
    settings = make_settings(**changes)
    main = partial(fake_engine.main, behaviour=behaviour or Behaviour())
    return EngineClient(settings, metrics or Metrics(settings), partial(LocalEngines, main=main))


def generation(name: str, max_tokens: int = 5, **changes: Any) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens)
    seed = len(name) + ord(name[-1])
    return Submit(name, (1, 2, 3), sampling, seed=seed, **changes)


async def deltas_of(client: EngineClient, wanted: Submit, **names: Any) -> list[Delta]:
    return await rest_of(client.generate([wanted], **names))


async def rest_of(stream: DeltaStream) -> list[Delta]:
    """What still comes of a request with one sequence."""
    deltas = [await next_of(stream)]
    while deltas[-1].finish_reason is None:
        deltas.append(await next_of(stream))
    return deltas


async def next_of(stream: DeltaStream) -> Delta:
    _, said = await stream.receive()
    if isinstance(said, QuickchangeError):
        raise said
    return said


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
