"""Kill -9 of the real engine in mid-stream: every stream ends as in an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import poisoned_engine
import pytest
from client_support import next_of
from served_model import mixed_generations, served_model

from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.errors import RequestFailedError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import SamplingParams, Submit

NEW_TOKENS = 150
LIMIT_SECONDS = 900  # on a busy machine


async def tokens_of(client: EngineClient, wanted: Submit, seen: list[int]) -> list[int]:
    tokens: list[int] = []
    stream = client.generate([wanted], label="a")
    ended = False
    while not ended:
        delta = await next_of(stream)
        tokens += delta.token_ids
        seen.append(len(delta.token_ids))
        ended = delta.finish_reason is not None
    return tokens


async def collect(settings: Settings, wanted: list[Submit], kills: int) -> list[list[int]]:
    client = EngineClient(settings, Metrics(settings), partial(LocalEngines, main=engine_main))
    await client.start()
    seen: list[int] = []
    try:
        streams = [asyncio.create_task(tokens_of(client, w, seen)) for w in wanted]
        for kill in range(kills):
            while len(seen) < (kill + 1) * len(wanted) * NEW_TOKENS // 4:
                await asyncio.sleep(0.002)
            assert client.pid is not None
            assert not all(stream.done() for stream in streams)
            os.kill(client.pid, signal.SIGKILL)
        return await asyncio.gather(*streams)
    finally:
        await client.close(drain_seconds=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[Submit]]:
    settings, digests = served_model(tmp_path_factory.mktemp("served"))
    return settings, mixed_generations(digests, NEW_TOKENS)


@pytest.fixture(scope="module")
def undisturbed(served: tuple[Settings, list[Submit]]) -> list[list[int]]:
    return asyncio.run(asyncio.wait_for(collect(*served, kills=0), LIMIT_SECONDS))


def test_streams_survive_kill_9_of_the_engine(
    served: tuple[Settings, list[Submit]], undisturbed: list[list[int]]
) -> None:
    settings, wanted = served

    async def scenario() -> None:
        disturbed = await collect(settings, wanted, kills=2)
        assert [len(tokens) for tokens in undisturbed] == [NEW_TOKENS] * len(wanted)
        assert disturbed == undisturbed
        assert len({tuple(tokens) for tokens in undisturbed}) == len(wanted)

    asyncio.run(asyncio.wait_for(scenario(), LIMIT_SECONDS))


def test_streams_survive_a_request_that_ends_the_real_engine(
    served: tuple[Settings, list[Submit]], undisturbed: list[list[int]]
) -> None:
    settings, wanted = served

    async def scenario() -> None:
        metrics = Metrics(settings)
        client = EngineClient(settings, metrics, partial(LocalEngines, main=poisoned_engine.main))
        await client.start()
        seen: list[int] = []
        try:
            streams = [asyncio.create_task(tokens_of(client, w, seen)) for w in wanted]
            while len(seen) < len(wanted) * NEW_TOKENS // 4:
                await asyncio.sleep(0.002)
            poison = (poisoned_engine.POISON, 1, 2)
            culprit = Submit("poison", poison, SamplingParams(max_tokens=9), seed=1)
            with pytest.raises(RequestFailedError, match="SIGSEGV"):
                await tokens_of(client, culprit, [])
            assert await asyncio.gather(*streams) == undisturbed
        finally:
            await client.close(drain_seconds=0)
        text = metrics.render()[0].decode()
        # Each stream once, and the culprit twice.
        assert f"requests_resubmitted_total {len(wanted) + 2}.0" in text

    asyncio.run(asyncio.wait_for(scenario(), LIMIT_SECONDS))
