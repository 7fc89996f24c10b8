"""Two real engines as replicas: one is killed in mid-stream, and another goes on with its text."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from functools import partial

import pytest
from client_support import deltas_of, tokens_of, until
from served_model import mixed_generations, served_model

from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.engine_client.remote.remote_engines import RemoteEngines
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.entrypoints.engine_start import engine_main, preload
from quickchange_server.errors import QuickchangeError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Delta, Submit

NEW_TOKENS = 120
SECONDS = 300.0


class EngineReplicas:
    """`ReplicaCalls` to clients of engine processes, each a replica; sequences take turns."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.clients = [
            EngineClient(settings, Metrics(settings), partial(LocalEngines, main=engine_main))
            for _ in range(count)
        ]
        self.gone = [asyncio.Event() for _ in range(count)]
        self.began: list[int] = []
        self.tokens = 0

    async def start(self) -> None:
        preload()
        await asyncio.gather(*(client.start() for client in self.clients))

    async def stop(self) -> None:
        await asyncio.gather(*(client.close(0) for client in self.clients))

    def kill(self, index: int) -> None:
        """End a replica with its engine."""
        self.gone[index].set()
        pid = self.clients[index].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    async def generate(self, submit: Submit) -> AsyncGenerator[tuple[Delta, ...], None]:
        there = [i for i, gone in enumerate(self.gone) if not gone.is_set()]
        index = there[len(self.began) % len(there)]
        self.began.append(index)
        stream = self.clients[index].generate([submit], label="a")
        lost = asyncio.create_task(self.gone[index].wait())
        try:
            finished = False
            while not finished:
                reading = asyncio.create_task(stream.receive())
                await asyncio.wait([reading, lost], return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    reading.cancel()
                    raise ReplicaLostError("killed")
                _, said = reading.result()
                if isinstance(said, QuickchangeError):
                    raise said
                self.tokens += len(said.token_ids)
                finished = said.finish_reason is not None
                yield (said,)
        finally:
            lost.cancel()
            stream.close()

    async def command(self, command: AdapterCommand) -> None:
        raise AssertionError(command)

    async def view(self) -> ClusterView:
        return ClusterView(
            tuple(
                ReplicaReport(str(i), "engine", "node", client.state, client.info)
                for i, client in enumerate(self.clients)
                if not self.gone[i].is_set()
            )
        )


async def collect(settings: Settings, wanted: list[Submit], *, kill: bool) -> list[list[int]]:
    replicas = EngineReplicas(settings, 2)
    await replicas.start()
    client = EngineClient(settings, Metrics(settings), partial(RemoteEngines, calls=replicas))
    try:
        await client.start()
        streams = [asyncio.create_task(deltas_of(client, w, label="a")) for w in wanted]
        if kill:
            await until(lambda: replicas.tokens > len(wanted) * NEW_TOKENS // 4)
            assert not any(stream.done() for stream in streams)
            replicas.kill(0)
        texts = [tokens_of(deltas) for deltas in await asyncio.gather(*streams)]
        assert set(replicas.began) == {0, 1}
        assert len(replicas.began) == len(wanted) + (replicas.began.count(0) if kill else 0)
        return texts
    finally:
        await client.close(0)
        await replicas.stop()


def test_streams_of_a_killed_replica_end_as_in_an_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings, digests = served_model(tmp_path_factory.mktemp("replicas"))
    wanted = mixed_generations(digests, NEW_TOKENS)

    async def scenario() -> None:
        undisturbed = await collect(settings, wanted, kill=False)
        assert [len(tokens) for tokens in undisturbed] == [NEW_TOKENS] * len(wanted)
        assert len({tuple(tokens) for tokens in undisturbed}) == len(wanted)
        assert await collect(settings, wanted, kill=True) == undisturbed

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
