"""Real engines of one or several ranks, through the client and its supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from client_support import rest_of

from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.engine_start import engine_main, preload
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, Submit

SECONDS = 300.0


def settings_of(model: Path, store: Path, ranks: int, **changes: Any) -> Settings:
    """Small caches, so that blocks and adapters are short of room."""
    small = {
        "block_size": 4,
        "kv_cache_bytes": 1 << 20,
        "max_batch_tokens": 32,
        "max_sequences": 8,
        "threads": 1,
        "prompt_lookup": False,  # the model has no tokenizer
        "tensor_parallel": ranks,
    }
    return Settings.model_validate({"model": str(model), "store": store, **small, **changes})


@asynccontextmanager
async def engine_group(
    settings: Settings, main: EngineMain = engine_main
) -> AsyncIterator[EngineClient]:
    """A client whose engine is ready."""
    preload()
    client = EngineClient(settings, Metrics(settings), partial(LocalEngines, main=main))
    await client.start()
    try:
        yield client
    finally:
        await client.close(drain_seconds=0)


async def answers(client: EngineClient, wanted: Sequence[Submit]) -> list[list[Delta]]:
    """What is said of each request, all at once."""
    streams = [client.generate([each], label="a") for each in wanted]
    return await asyncio.gather(*[rest_of(stream) for stream in streams])


def answered(
    settings: Settings, wanted: Sequence[Submit], main: EngineMain = engine_main
) -> list[list[Delta]]:
    """The answers of an engine that lives for them alone."""

    async def scenario() -> list[list[Delta]]:
        async with engine_group(settings, main) as client:
            return await answers(client, wanted)

    return asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children; an engine's are its followers."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def lives(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
